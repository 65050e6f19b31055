"""Sessions: where a graph's variables have their values, and what runs it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpusaver.compat.v1.execution import Plan, Step, execute, make_plan, refuse_dead
from gpusaver.compat.v1.graph import Graph, Operation, Tensor, get_default_graph, session_stack
from gpusaver.compat.v1.ops.state import Slot
from gpusaver.compat.v1.shapes import is_compatible
from gpusaver.device.arrays import array_module
from gpusaver.tensor import DataType

#: Plans kept by a session; a script that fetches something new in every step would fill memory without a limit.
_MAX_PLANS = 256


class Run:
    """What kernels see of a session: the array module and the variables' arrays by key."""

    def __init__(self, xp: Any, variables: dict[str, Any], generators: dict[str, np.random.Generator]) -> None:
        self.xp = xp
        self.variables = variables
        self.array_types: tuple[type, ...] = (xp.ndarray, np.ndarray)
        self._generators = generators

    def random(self, op: Operation) -> np.random.Generator:
        """Of one random operation: its own stream of numbers, the same in each session if it has a seed."""
        found = self._generators.get(op.name)
        if found is None:
            seeds = (op.attrs["seed"], op.attrs["seed2"])
            key = [seed % 2**64 for seed in seeds] if any(seeds) else secrets.randbits(128)
            found = self._generators[op.name] = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        return found


class BaseSession:
    """Runs a graph.  ``target`` and ``config`` are accepted for the sake of old scripts, and have no effect."""

    def __init__(self, target: str = "", graph: Graph | None = None, config: Any = None) -> None:
        self.graph = get_default_graph() if graph is None else graph
        if not isinstance(self.graph, Graph):
            raise TypeError(f"graph must be a tf.Graph, but got {type(graph).__name__}")
        self.xp = array_module()
        #: Key of a variable -> array; replaced, never written to.
        self.variables: dict[str, Any] = {}
        generators: dict[str, np.random.Generator] = {}
        self._run = Run(self.xp, self.variables, generators)
        self._host_run = Run(np, self.variables, generators)
        self._plans: dict[Any, Plan] = {}
        self._closed = False

    def run(
        self, fetches: Any, feed_dict: Mapping[Any, Any] | None = None, options: Any = None, run_metadata: Any = None
    ) -> Any:
        """The values of ``fetches``: a tensor, operation, variable or name, or a list, tuple or dict of these, nested.

        Values are NumPy arrays (rank 0: scalars), None for operations.  ``feed_dict``: tensor -> value instead of
        computing it.  Raises RuntimeError if closed, TypeError and ValueError for what is no fetch or feed of this
        graph, InvalidArgumentError and its kin, naming the node, if something fails while running.
        """
        self.check_open()
        if not self.graph.version:
            raise RuntimeError("The Session graph is empty.  Add operations to the graph before calling run().")
        elements: list[Tensor | Operation] = []
        shape_of = self._fetch(fetches, elements)
        fed = {self._fed(key): value for key, value in (feed_dict or {}).items()}
        fed = {tensor: self._converted(tensor, value) for tensor, value in fed.items()}
        key = (tuple(map(id, elements)), tuple(map(id, fed)))
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = make_plan(elements, fed, self._to_device, None if self.xp is np else self._placed)
        with np.errstate(all="ignore"):
            values = execute(plan, self._run, fed)
        results = [
            None if value is None else self._result(refuse_dead(element, value))
            for element, value in zip(elements, values, strict=True)
        ]
        return shape_of(results)

    def check_open(self) -> None:
        if self._closed:
            raise RuntimeError("Attempted to use a closed Session.")

    def close(self) -> None:
        """Frees the variables.  Idempotent."""
        self._closed = True
        self.variables.clear()
        self._plans.clear()

    def list_devices(self) -> list[str]:
        return ["/device:CPU:0"] if self.xp is np else ["/device:CPU:0", "/device:GPU:0"]

    def as_default(self) -> _AsDefault:
        """For ``with``: the session that ``eval`` and ``run`` use; it is not closed at the end."""
        return _AsDefault(self)

    # -- fetches and feeds

    def _fetch(self, fetch: Any, elements: list[Tensor | Operation]) -> Any:
        """Adds what is to be computed, and returns the function that puts results into the form of ``fetch``."""
        if isinstance(fetch, Mapping):
            parts = {key: self._fetch(item, elements) for key, item in fetch.items()}
            return lambda results: type(fetch)((key, part(results)) for key, part in parts.items())  # type: ignore[call-arg]
        if isinstance(fetch, list | tuple):
            items = [self._fetch(item, elements) for item in fetch]
            if hasattr(fetch, "_fields"):  # a named tuple
                return lambda results: type(fetch)(*(item(results) for item in items))
            return lambda results: type(fetch)(item(results) for item in items)
        if fetch is None:
            raise TypeError("Fetch argument None has invalid type <class 'NoneType'>")
        try:
            element = self.graph.as_graph_element(fetch)
        except TypeError as error:
            raise TypeError(
                f"Fetch argument {fetch!r:.80} has invalid type {type(fetch)}, must be a string or Tensor. ({error})"
            ) from None
        except (ValueError, KeyError) as error:
            text = error.args[0] if error.args else error
            raise ValueError(f"Fetch argument {fetch!r:.80} cannot be interpreted as a Tensor. ({text})") from None
        number = len(elements)
        elements.append(element)
        return lambda results: results[number]

    def _fed(self, key: Any) -> Tensor:
        try:
            tensor = self.graph.as_graph_element(key, allow_operation=False)
        except (ValueError, KeyError, TypeError) as error:
            text = error.args[0] if error.args else error
            raise TypeError(f"Cannot interpret feed_dict key as Tensor: {text}") from None
        assert isinstance(tensor, Tensor)
        return tensor

    def _converted(self, tensor: Tensor, value: Any) -> Any:
        if isinstance(value, Tensor):
            raise TypeError(
                f"The value of a feed cannot be a tf.Tensor object, found {value!r} for {tensor.name!r}. Acceptable "
                "feed values include Python scalars, strings, lists, NumPy ndarrays."
            )
        is_string = tensor.datatype is DataType.string
        if is_string:
            array = _byte_strings(value)
        elif isinstance(value, self.xp.ndarray) and self.xp is not np:
            array = value.astype(tensor.datatype.numpy_dtype, copy=True)
        else:
            array = np.array(value, dtype=tensor.datatype.numpy_dtype)  # a copy: the caller may change the value
        if not is_compatible(tensor.static_shape, array.shape):
            raise ValueError(
                f"Cannot feed value of shape {tuple(array.shape)} for Tensor {tensor.name!r}, which has shape "
                f"'{tensor.shape}'"
            )
        return array if is_string else self._to_device(array)

    # -- arrays and where they are

    def _to_device(self, value: Any) -> Any:
        return value if value.dtype == object else self.xp.asarray(value)

    def _result(self, value: Any) -> Any:
        if isinstance(value, Slot):  # the handle of a resource variable
            value = value.read(self._run)
        if self.xp is not np and isinstance(value, self.xp.ndarray):
            value = self.xp.asnumpy(value)
        elif isinstance(value, np.ndarray):
            value = value.copy()  # never the array of a variable or a constant
        return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value

    def _placed(self, step: Step) -> Step:
        """The step for CuPy: sizes and the like stay on the host, and where kinds meet, all go to the device."""
        kernel, op, *_ = step
        on_host = [arg.on_host for arg in op.row.input_args(op.attrs)] if op.row is not None else []
        if len(on_host) != len(step.inputs):  # the reading of a reference
            return step
        device = self.xp.ndarray

        def placed(run: Any, op: Operation, *values: Any) -> Any:
            given = list(values)
            free = [number for number, host in enumerate(on_host) if not host]
            is_mixed = any(isinstance(given[number], device) for number in free)
            for number, host in enumerate(on_host):
                value = given[number]
                if host and isinstance(value, device):
                    given[number] = self.xp.asnumpy(value)
                elif not host and is_mixed and isinstance(value, np.ndarray | np.generic) and value.dtype != object:
                    given[number] = self.xp.asarray(value)
            all_host = free and not is_mixed and all(isinstance(given[n], np.ndarray | np.generic) for n in free)
            return kernel(self._host_run if all_host else run, op, *given)

        return step._replace(kernel=placed)


def _byte_strings(value: Any) -> np.ndarray[Any, Any]:
    array = np.array(value, dtype=object)
    flat = [item.encode("utf-8", "surrogateescape") if isinstance(item, str) else item for item in array.reshape(-1)]
    if not all(isinstance(item, bytes) for item in flat):
        raise TypeError(f"Expected strings to feed, found {value!r:.80}")
    result = np.empty(array.shape, object)
    result.reshape(-1)[:] = flat
    return result


class _AsDefault:
    def __init__(self, session: BaseSession) -> None:
        self._session = session
        self._graph: Any = None

    def __enter__(self) -> BaseSession:
        session_stack().append(self._session)
        return self._session

    def __exit__(self, *exception: object) -> None:
        session_stack().remove(self._session)


class Session(BaseSession):
    """A context manager: inside, it and its graph are the default ones; leaving closes it."""

    def __enter__(self) -> Session:
        self._default_graph = self.graph.as_default()
        self._default_graph.__enter__()
        session_stack().append(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        session_stack().remove(self)
        self._default_graph.__exit__(None, None, None)
        self.close()


class InteractiveSession(BaseSession):
    """The default session from its making until ``close``."""

    def __init__(self, target: str = "", graph: Graph | None = None, config: Any = None) -> None:
        super().__init__(target, graph, config)
        self._default_graph = self.graph.as_default() if graph is not None else None
        if self._default_graph is not None:
            self._default_graph.__enter__()
        session_stack().append(self)

    def close(self) -> None:
        if not self._closed:
            session_stack().remove(self)
            if self._default_graph is not None:
                self._default_graph.__exit__(None, None, None)
        super().close()


class ConfigProto:
    """Takes every option that scripts set, and has no effect: the session runs on one device."""

    def __init__(self, **options: Any) -> None:
        self.gpu_options = GPUOptions()
        for name, value in options.items():
            setattr(self, name, value)


class GPUOptions:
    """The same for ``config.gpu_options.allow_growth = True`` and its kin."""

    def __init__(self, **options: Any) -> None:
        for name, value in options.items():
            setattr(self, name, value)
