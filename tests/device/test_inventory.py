"""gpusaver.devices(), with a CuPy that is simulated and an NVML that is made up."""

from __future__ import annotations

import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pynvml
import pytest
from sim.fixture import simulated_cupy  # noqa: F401

import gpusaver
from gpusaver.device import inventory, nvml

ERRORS = sorted(
    {cls for cls in vars(pynvml).values() if isinstance(cls, type) and issubclass(cls, pynvml.NVMLError)},
    key=lambda cls: cls.__name__,
)
#: What the fake answers; the handle is the bus id that was asked for.
ANSWERS: dict[str, Any] = {
    "nvmlInit": lambda: None,
    "nvmlDeviceGetHandleByPciBusId": lambda bus_id: bus_id,
    "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
    "nvmlDeviceGetMigMode": lambda handle: [0, 0],
    "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(total=141 << 30, free=100 << 30, used=41 << 30),
    "nvmlDeviceGetCurrPcieLinkGeneration": lambda handle: 1,
    "nvmlDeviceGetMaxPcieLinkGeneration": lambda handle: 5,
    "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: 16,
    "nvmlDeviceGetMaxPcieLinkWidth": lambda handle: 16,
    "nvmlDeviceGetCpuAffinity": lambda handle, words: [0b1010, 1 << 63, *[0] * (words - 2)],
}
#: The fields that a refused question leaves neutral, and what they are then.
HIDDEN = {
    "nvmlDeviceGetName": {"model": "Simulated GPU"},
    "nvmlDeviceGetMigMode": {},
    "nvmlDeviceGetMemoryInfo": {"memory_nbytes": 64 << 20},
    "nvmlDeviceGetCurrPcieLinkGeneration": {"pcie_generation": 0},
    "nvmlDeviceGetMaxPcieLinkGeneration": {"max_pcie_generation": 0, "link_rate": 0.0},
    "nvmlDeviceGetCurrPcieLinkWidth": {"pcie_width": 0},
    "nvmlDeviceGetMaxPcieLinkWidth": {"max_pcie_width": 0},
    "nvmlDeviceGetCpuAffinity": {"cpus": frozenset()},
}


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """What lasts for the life of a process lasts here for a test."""
    for function in (nvml._nvml, inventory._lasting):
        function.cache_clear()
    yield
    for function in (nvml._nvml, inventory._lasting):
        function.cache_clear()


Install = Callable[..., None]


@pytest.fixture
def fake_nvml(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Call it with answers that differ; an exception as an answer is raised, None takes the function away."""

    def install(**changed: Any) -> None:
        module = types.ModuleType("pynvml")
        for name, answer in {**ANSWERS, **changed}.items():
            if isinstance(answer, Exception):
                answer = _raising(answer)
            if answer is not None:
                setattr(module, name, answer)
        monkeypatch.setitem(sys.modules, "pynvml", module)

    return install


def _raising(error: Exception) -> Callable[..., Any]:
    def function(*args: Any) -> Any:
        raise error

    return function


def forget_cuda_info(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that ran before may have left it, with a CuPy of its own."""
    monkeypatch.delitem(sys.modules, "gpusaver.device.cuda_info", raising=False)
    monkeypatch.delattr(gpusaver.device, "cuda_info", raising=False)


def test_a_machine_without_cupy_has_no_devices(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    forget_cuda_info(monkeypatch)
    assert gpusaver.devices() == []
    assert inventory.why_no_devices().startswith("CuPy cannot be imported:")
    assert inventory.link_rate("cpu:0") == inventory.link_rate("cuda:0") == 0.0
    assert inventory.nearby_cpus("cuda:0") == frozenset()


def test_without_a_driver_the_reason_is_told(sim, fake_nvml):
    fake_nvml()
    sim.has_driver = False
    assert gpusaver.devices() == []
    assert inventory.why_no_devices().startswith("CuPy is installed, but CUDA cannot be used:")


def test_every_device_is_matched_by_its_bus_id(sim, fake_nvml):
    names = {b"0000:01:00.0": "NVIDIA A", b"0000:02:00.0": "NVIDIA B"}
    fake_nvml(nvmlDeviceGetName=lambda handle: names[handle])
    first, second = gpusaver.devices()
    assert first == gpusaver.DeviceInfo(
        name="cuda:0",
        pci_bus_id="0000:01:00.0",
        model="NVIDIA A",
        memory_nbytes=141 << 30,
        free_nbytes=100 << 30,
        is_mig=False,
        pcie_generation=1,
        max_pcie_generation=5,
        pcie_width=16,
        max_pcie_width=16,
        link_rate=pytest.approx(63.0e9, rel=1e-3),
        cpus=frozenset({1, 3, 127}),
    )
    assert (second.name, second.model) == ("cuda:1", "NVIDIA B")
    assert inventory.why_no_devices() == ""
    assert inventory.link_rate("cuda:0") == first.link_rate
    assert inventory.nearby_cpus("cuda:0") == first.cpus
    with pytest.raises(AttributeError):
        first.model = "another"


@pytest.mark.parametrize("error", ERRORS, ids=[cls.__name__ for cls in ERRORS])
@pytest.mark.parametrize("function", HIDDEN)
def test_what_a_driver_refuses_is_neutral(sim, fake_nvml, function, error):
    fake_nvml()
    whole = gpusaver.devices()[0]
    nvml._nvml.cache_clear()
    fake_nvml(**{function: error(1) if error is pynvml.NVMLError else error()})
    found = gpusaver.devices()[0]
    changed = {name for name in whole.__slots__ if getattr(whole, name) != getattr(found, name)}
    assert changed == {*HIDDEN[function]} | ({"free_nbytes"} if function.endswith("MemoryInfo") else set())
    for name, value in HIDDEN[function].items():
        assert getattr(found, name) == value


@pytest.mark.parametrize("error", ERRORS, ids=[cls.__name__ for cls in ERRORS])
@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetHandleByPciBusId"])
def test_cupy_alone_still_counts_the_devices(sim, fake_nvml, function, error):
    fake_nvml(**{function: error(1) if error is pynvml.NVMLError else error()})
    expected = gpusaver.DeviceInfo(
        "cuda:1", "0000:02:00.0", model="Simulated GPU", memory_nbytes=64 << 20, free_nbytes=64 << 20
    )
    assert gpusaver.devices()[1] == expected


def test_an_old_package_lacks_functions(sim, fake_nvml):
    fake_nvml(**dict.fromkeys(HIDDEN))
    assert gpusaver.devices()[0].model == "Simulated GPU"


def test_without_the_package_cupy_alone_answers(sim, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert [device.name for device in gpusaver.devices()] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("answer", "model"),
    [(b"NVIDIA H200\0\0", "NVIDIA H200"), ("NVIDIA H2\0garbage", "NVIDIA H2"), (b"NVIDIA \xe2\x84", "NVIDIA \ufffd")],
)
def test_names_may_be_bytes_padded_or_cut(sim, fake_nvml, answer, model):
    fake_nvml(nvmlDeviceGetName=lambda handle: answer)
    assert gpusaver.devices()[0].model == model


def test_a_mig_slice_has_its_own_name_and_memory(sim, fake_nvml):
    fake_nvml(nvmlDeviceGetMigMode=lambda handle: [1, 1])
    array = sim.cupy.zeros(1 << 20, "u1")
    device = gpusaver.devices()[0]
    assert device.is_mig
    assert (device.model, device.memory_nbytes) == ("Simulated GPU", 64 << 20)
    assert device.free_nbytes == device.memory_nbytes - array.nbytes
    assert device.link_rate > 60e9


@pytest.mark.parametrize(
    ("generation", "width", "rate"), [(3, 16, 15.75e9), (4, 8, 15.75e9), (6, 16, 121e9), (7, 16, 0.0), (0, 0, 0.0)]
)
def test_the_rate_of_the_link(sim, fake_nvml, generation, width, rate):
    fake_nvml(
        nvmlDeviceGetMaxPcieLinkGeneration=lambda handle: generation,
        nvmlDeviceGetCurrPcieLinkWidth=lambda handle: width,
        nvmlDeviceGetMaxPcieLinkWidth=lambda handle: width,
    )
    assert gpusaver.devices()[0].link_rate == pytest.approx(rate, rel=2e-3)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are bound to CPUs on Linux")
def test_a_thread_is_bound_to_the_cpus_it_may_use():
    allowed = os.sched_getaffinity(0)
    one = min(allowed)
    for cpus, expected in (
        (frozenset({one, 10_000}), {one}),
        (frozenset({10_000}), allowed),
        (frozenset(), allowed),
        (frozenset(allowed), allowed),
    ):
        found: list[set[int]] = []

        def run(cpus: frozenset[int] = cpus, found: list[set[int]] = found) -> None:
            nvml.bind_thread(cpus)
            found.append(os.sched_getaffinity(0))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert found == [expected]
    assert os.sched_getaffinity(0) == allowed


def test_the_software_between_arrays_and_devices(sim, fake_nvml, monkeypatch):
    import cupy

    forget_cuda_info(monkeypatch)
    fake_nvml(nvmlSystemGetDriverVersion=lambda: b"590.48.01")
    monkeypatch.setattr(cupy, "__version__", "14.2.0", raising=False)
    versions = {"runtimeGetVersion": lambda: 13000, "driverGetVersion": lambda: 13010}
    for name, answer in versions.items():
        monkeypatch.setattr(cupy.cuda.runtime, name, answer, raising=False)
    nvrtc = types.SimpleNamespace(getVersion=lambda: (13, 0))
    monkeypatch.setattr(cupy.cuda, "nvrtc", nvrtc, raising=False)
    assert inventory.software() == {
        "cupy": "14.2.0",
        "cuda": "13.0",
        "driver": "13.1",
        "nvml": "590.48.01",
        "nvrtc": "13.0",
        "cupy problem": "",
        "nvrtc problem": "",
    }
    monkeypatch.setattr(nvrtc, "getVersion", _raising(RuntimeError("no libnvrtc.so.13")))
    monkeypatch.setattr(cupy.cuda.runtime, "driverGetVersion", _raising(RuntimeError("no driver")))
    found = inventory.software()
    assert (found["nvrtc"], found["nvrtc problem"], found["driver"]) == ("", "no libnvrtc.so.13", "")


def test_the_software_of_a_machine_without_any(fake_nvml, monkeypatch):
    fake_nvml(nvmlInit=RuntimeError("no driver"))
    monkeypatch.setitem(sys.modules, "cupy", None)
    forget_cuda_info(monkeypatch)
    found = inventory.software()
    assert found.pop("cupy problem").startswith("import of cupy halted")
    assert set(found.values()) == {""}
