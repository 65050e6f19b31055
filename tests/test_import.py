"""What `import gpusaver` loads.  `make package` prints how long it takes; this list does not depend on the machine."""

from __future__ import annotations

import subprocess
import sys

#: gpusaver's dependencies come first: what they load is theirs.
CODE = """
import sys
import numpy, ml_dtypes, fastcrc, google.protobuf.internal.builder
before = set(sys.modules)
import gpusaver
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
#: Parts of its dependencies, and what is small of the standard library; neither CuPy nor any other package. `socket`,
#: `secrets` and `difflib` alone cost a tenth of all.
ALLOWED = frozenset(
    """gpusaver google numpy
    __future__ _bisect _colorize _heapq _json _locale _queue _random _sha2 _sha512 _string array atexit base64 binascii
    bisect calendar concurrent dataclasses datetime errno fcntl gc heapq json logging mmap queue random signal string
    threading traceback zlib""".split()
)


def test_import_loads_these_modules_and_no_others() -> None:
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(ran.stdout.split())
    assert "gpusaver" in loaded
    assert loaded - ALLOWED == set()
