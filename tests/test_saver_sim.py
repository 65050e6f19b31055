"""A Saver of arrays on simulated devices, which are as slow and as hasty as they may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from sim.errors import CUDARuntimeError
from sim.fixture import SCHEDULES, every_schedule, simulated_cupy  # noqa: F401
from sim.tools import late, on_device, on_host, stored, values

import gpusaver
from gpusaver.errors import FailedPreconditionError, ResourceExhaustedError
from gpusaver.pipeline import recycling
from gpusaver.saver import Saver
from gpusaver.storage.local import RECYCLED_FILE_SYSTEMS, file_system


def state(sim: Any, seed: int = 0) -> dict[str, Any]:
    """Of every kind of layout, 0.7 MB, on two devices and the host."""
    rng = np.random.default_rng(seed)
    big, middle = rng.standard_normal((300, 500)).astype(np.float32), rng.integers(0, 9, (64, 33)).astype(np.int16)
    result = {"big": on_device(sim, big), "turned": on_device(sim, middle).T, "odd": on_device(sim, middle)[1:, ::3]}
    result["bf16"] = on_device(sim, values(np.dtype(ml_dtypes.bfloat16), seed))[:, ::2]
    with sim.cupy.cuda.Device(1):
        result["other/w"] = on_device(sim, rng.standard_normal(200).astype(np.float64))
        result["other/empty"] = sim.cupy.zeros((0, 4), np.float32)
        result["other/scalar"] = on_device(sim, np.asarray(seed, np.int64))
    result["host"] = middle[::2].copy()
    return result


def contents(sim: Any, variables: dict[str, Any]) -> dict[str, bytes]:
    return {name: stored(a) if isinstance(a, np.ndarray) else on_host(a) for name, a in variables.items()}


def change(variables: dict[str, Any], value: int) -> None:
    for array in variables.values():
        if isinstance(array, np.ndarray):
            array.fill(value)
            continue
        with array.device:
            array.fill(value)


@late
def test_a_plan_is_used_again_only_for_arrays_like_those_before(sim, tmp_path):
    """Quickly compared by columns: each of these changes one of them."""
    rng = np.random.default_rng(3)
    models = {f"v{n}": rng.standard_normal(50 + n) for n in range(20)}
    variables = {name: on_device(sim, model) for name, model in models.items()} | {"step": 7, "host": np.arange(4)}
    changes: dict[str, Any] = {
        "nothing": {},
        "new arrays": {"v0": on_device(sim, models["v0"] + 1), "host": np.arange(4) + 1},
        "another shape": {"v1": on_device(sim, models["v1"].reshape(3, 17))},
        "another type": {"v2": on_device(sim, models["v2"].astype(np.float32))},
        "strided": {"v3": on_device(sim, rng.standard_normal(106))[::2]},
        "tied": {"v4": variables["v5"]},
        "tied by another object": {"v4": variables["v5"].view(np.float64)},
        "to the host": {"v6": models["v6"]},
        "from the host": {"host": on_device(sim, np.arange(4))},
        "to another device": {"v7": on_another(sim, models["v7"])},
        "a scalar": {"v8": 3.5},
        "back": {},
    }
    before = dict(variables)
    with Saver(variables) as saver:
        for what, change_ in changes.items():
            variables.update(before)
            variables.update(change_)
            for capture in ("blocking", "snapshot"):
                prefix = saver.save_async(tmp_path / "model", capture=capture).result()
                found = gpusaver.load(prefix)
                for name, value in variables.items():
                    expected = value.get() if hasattr(value, "get") else np.asarray(value)
                    assert found[name].dtype == expected.dtype, (what, name)
                    assert np.array_equal(found[name], expected), (what, name)


def on_another(sim: Any, model: np.ndarray[Any, Any]) -> Any:
    with sim.cupy.cuda.Device(1):
        return on_device(sim, model)


@every_schedule
@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
def test_a_saver_saves_and_restores(sim, tmp_path, sharded):
    variables = state(sim)
    expected = contents(sim, variables)
    pointers = {name: array.data.ptr for name, array in variables.items() if name != "host"}
    with Saver(variables, sharded=sharded) as saver:
        prefix = saver.save(tmp_path / "model", global_step=1)
        change(variables, 7)
        saver.restore(prefix)
        for array in list(variables.values())[:2]:
            array *= 1  # queued after the restored values
    assert contents(sim, variables) == expected
    assert {name: array.data.ptr for name, array in variables.items() if name != "host"} == pointers
    files = sorted(path.name for path in tmp_path.iterdir() if ".data-" in path.name)
    assert len(files) == (3 if sharded else 1)
    sim.assert_quiescent()


@every_schedule
@pytest.mark.parametrize("capture", ["snapshot", "deferred", "blocking", "auto"])
def test_the_file_holds_the_values_at_the_call(sim, tmp_path, capture):
    """The variables change at the first moment that the capture mode allows."""
    variables = state(sim)
    expected = contents(sim, variables)
    with Saver(variables) as saver:
        for step in range(2):
            saver_pending = saver.save_async(tmp_path / "model", global_step=step, capture=capture)
            if capture == "deferred":
                saver_pending.fence()
            change(variables, 50 + step)
            prefix = saver_pending.result()
            change(variables, 1)
            saver.restore(prefix)
            assert contents(sim, variables) == expected
    sim.assert_quiescent()


@every_schedule
@pytest.mark.parametrize("capture", ["snapshot", "deferred"])
def test_a_save_sees_what_was_queued_before_it(sim, tmp_path, capture):
    variables = {name: array for name, array in state(sim).items() if array.dtype != ml_dtypes.bfloat16}
    sim.cupy.cuda.Device().synchronize()
    with Saver(variables) as saver:
        change(variables, 7)
        prefix = saver.save_async(tmp_path / "model", capture=capture).result()
    assert all((value == 7).all() for value in gpusaver.load(prefix).values())


def test_files_are_the_same_as_from_numpy(sim, tmp_path):
    """Sizes are multiples of 16, the alignment of small tensors that a device writes."""
    rng = np.random.default_rng(3)
    host = {f"v{n}": rng.integers(0, 99, (8, 2 * n + 2)).astype(np.int32) for n in range(40)}
    host["large"] = rng.standard_normal((300, 400))
    device = {name: on_device(sim, array.T).T for name, array in host.items()}
    for name, variables in (("host", host), ("device", device)):
        with Saver(variables) as saver:
            saver.save(tmp_path / name / "model")
    for path in (tmp_path / "host").glob("model*"):
        assert path.read_bytes() == (tmp_path / "device" / path.name).read_bytes(), path.name


@late
def test_a_checkpoint_goes_from_the_device_to_the_host_and_back(sim, tmp_path):
    variables = state(sim)
    expected = contents(sim, variables)
    with Saver(variables) as saver:
        prefix = saver.save(tmp_path / "device")
    host = {name: np.zeros(array.shape, array.dtype) for name, array in variables.items()}
    with Saver(host) as saver:
        saver.restore(prefix)
        assert contents(sim, host) == expected
        prefix = saver.save(tmp_path / "host")
    change(variables, 3)
    with Saver(variables) as saver:
        saver.restore(prefix)
    assert contents(sim, variables) == expected


@late
def test_a_few_of_many_go_to_their_devices_a_slot_at_a_time(sim, tmp_path, monkeypatch):
    model = {f"v{number:03d}": np.full(9000, 1 + number % 250, np.uint8) for number in range(1000)}
    prefix = gpusaver.save(tmp_path / "model", model)
    some = {name: on_device(sim, np.zeros_like(array)) for name, array in list(model.items())[::20]}
    with sim.cupy.cuda.Device(1):
        some |= {name: on_device(sim, np.zeros_like(array)) for name, array in list(model.items())[10::20]}
    some |= {"v005": np.zeros_like(model["v005"]), "v015": on_device(sim, np.zeros((9000, 2), np.uint8))[:, 0]}
    from gpusaver.device.cuda import CudaRuntime

    filled: list[int] = []
    from_slot = CudaRuntime.from_slot

    def counting(self: Any, transfers: Any, slot: Any) -> Any:
        filled.append(len(list(transfers)))
        return from_slot(self, transfers, slot)

    monkeypatch.setattr(CudaRuntime, "from_slot", counting)
    with Saver(some) as saver:
        saver.restore(prefix)
    assert contents(sim, some) == {name: stored(model[name]) for name in some}
    assert sum(filled) == len(some) - 1
    assert len(filled) <= 7, filled  # two for each device, and what lies near v005 or v015


@late
def test_variables_live_on_their_device(sim, tmp_path):
    host = np.arange(100, dtype=np.float32)
    with gpusaver.variables():
        moved = [gpusaver.Variable(host + number, f"v{number}", device=f"cuda:{number}") for number in (0, 1)]
        assert [variable.value.device.id for variable in moved] == [0, 1]
        with pytest.raises(FailedPreconditionError, match="CuPy sees 2 CUDA devices"):
            gpusaver.Variable(host, device="cuda:7")
        with Saver(sharded=True) as saver:
            prefix = saver.save(tmp_path / "model")
    for number in (0, 1):
        assert gpusaver.load_variable(prefix, f"v{number}").tolist() == (host + number).tolist()
    assert len(list(tmp_path.glob("*.data-*-of-00002"))) == 2


@late
def test_tied_arrays_are_stored_once(sim, tmp_path):
    array = sim.cupy.arange(1000, dtype=np.float32)
    with Saver({"a": array, "b": array[:], "half": array[:500]}) as saver:
        saver.save(tmp_path / "model")
    assert next(tmp_path.glob("*.data-*")).stat().st_size == 6000


@pytest.mark.parametrize("sim", [{"schedule": name, "capacity": 1 << 20} for name in SCHEDULES], indirect=True)
def test_auto_blocks_where_memory_does_not_suffice(sim, tmp_path, caplog):
    variables = state(sim)
    expected = contents(sim, variables)
    with Saver(variables) as saver:
        with pytest.raises(ResourceExhaustedError):
            saver.save_async(tmp_path / "no", capture="snapshot")
        pending = saver.save_async(tmp_path / "model", capture="auto")
        assert pending.capture == "blocking"
        change(variables, 9)
        saver.restore(pending.result())
    assert contents(sim, variables) == expected
    assert "no room for a copy" in caplog.text


@pytest.mark.parametrize("capture", ["snapshot", "blocking"])
def test_whichever_call_fails_older_checkpoints_stay_good(sim, tmp_path: Path, capture):
    variables = {"a": sim.cupy.arange(300, dtype=np.int32), "b": sim.cupy.arange(60, dtype=np.int16).reshape(6, 10).T}
    expected = contents(sim, variables)
    with Saver(variables) as saver:
        good = saver.save(tmp_path / "good")
    number = failures = 0
    while failures == number:
        number += 1
        with Saver(variables) as saver:
            sim.fail_at(number)
            try:
                saver.save_async(tmp_path / "bad", capture=capture, write_state=False).result()
            except CUDARuntimeError:
                failures += 1
                assert not list(tmp_path.glob("bad*"))
                saver.save(tmp_path / "next", write_state=False)
            sim.fail_at(10**6)
            change(variables, 2)
            saver.restore(good)
            assert contents(sim, variables) == expected
    assert failures > 5
    sim.assert_quiescent()


def test_a_big_endian_device_array_is_refused_by_name(sim):
    array = sim.cupy.zeros(3, np.dtype(">f4"))
    with pytest.raises(TypeError, match=r"layer/w: a big-endian array"):
        Saver({"layer": {"w": array}})


@late
def test_the_plan_of_device_arrays_is_reused(sim, tmp_path, monkeypatch):
    """Also for new arrays in the place of old ones; what differs in anything, ties included, is planned anew."""
    import gpusaver.pipeline.plan as plan

    admitted: list[str] = []
    admit = plan.admit
    monkeypatch.setattr(plan, "admit", lambda value, name, dtype: admitted.append(name) or admit(value, name, dtype))
    with sim.cupy.cuda.Device(1):
        other = on_device(sim, np.arange(6, dtype=np.int64))
    variables = {"a": on_device(sim, np.arange(5.0)), "host": np.arange(3), "other": other}
    variables["b"] = variables["a"]
    variables["step"] = np.int64(3)  # no array: so not all are described by columns

    def seen() -> list[str]:
        names = sorted({*admitted} - {"step"})
        admitted.clear()
        return names

    def saved() -> list[str]:
        prefix = saver.save(tmp_path / "model")
        names = seen()
        found = {name: value.tolist() for name, value in gpusaver.load(prefix).items()}
        assert found == {name: value.tolist() for name, value in variables.items()}
        return names

    with Saver(variables) as saver:
        assert seen() == ["a", "b", "host", "other"]
        assert saved() == ["b"]  # tied ones are looked at
        assert saved() == ["b"]
        with sim.cupy.cuda.Device(1):
            variables["other"], variables["host"] = other * 2, variables["host"] + 1
        assert saved() == ["b"]
        variables["b"] = on_device(sim, np.arange(5.0) + 7)  # no longer tied
        assert saved() == ["b", "host", "other"]
        assert saved() == []
        variables["other"] = sim.cupy.asarray(variables["other"])  # on another device now
        variables["a"] = on_device(sim, np.arange(5, dtype=np.float32))
        assert saved() == ["a", "other"]
        variables["a"] = on_device(sim, np.arange(6, dtype=np.float32))
        assert saved() == ["a"]


@pytest.mark.parametrize("capture", ["snapshot", "deferred", "blocking"])
def test_devices_and_host_go_into_one_object(sim, monkeypatch, capture):
    """Its offsets ascend, whichever device is the faster one."""
    pytest.importorskip("obstore")
    monkeypatch.setattr("gpusaver.pipeline.save.CHUNK_NBYTES", 64 * 1024)
    variables = state(sim)
    with sim.cupy.cuda.Device(1):
        variables["other/big"] = on_device(sim, np.random.default_rng(1).random(200_000))
    expected = contents(sim, variables)
    with Saver(variables) as saver:
        pending = saver.save_async(f"memory://sim/{capture}", capture=capture)
        pending.fence()
        prefix = pending.result()
        change(variables, 7)
        saver.restore(prefix)
    assert contents(sim, variables) == expected
    assert list(gpusaver.verify(prefix)) == []
    sim.assert_quiescent()


@pytest.mark.parametrize("mode", [True, "declared"])
@pytest.mark.parametrize("capture", ["snapshot", "deferred", "blocking"])
def test_frozen_device_arrays_are_written_once(sim, tmp_path, capture, mode):
    """They are copied to the host to be hashed, as the copy stream has them."""
    pytest.importorskip("xxhash")
    with gpusaver.variables():
        variables = {
            name: gpusaver.Variable(array, name=name, trainable=name in ("other/w", "host", "odd"))
            for name, array in state(sim).items()
        }
    linked = []
    with Saver(list(variables.values()), incremental=mode, sharded=True) as saver:
        for step in range(4):
            change({name: variables[name].value for name in ("other/w", "host")}, step)
            if step == 2:
                change({"big": variables["big"].value}, step)
            expected = contents(sim, {name: variable.value for name, variable in variables.items()})
            pending = saver.save_async(tmp_path / "k", step, capture=capture)
            pending.fence()
            change({"other/w": variables["other/w"].value}, 99)
            prefix = pending.result()
            linked.append(pending.report.linked_nbytes)
            assert list(gpusaver.verify(prefix)) == []
            found = gpusaver.load(prefix)
            assert {name: stored(array) for name, array in found.items()} == expected
    assert linked[0] == 0
    assert linked[1] > 300 * 500 * 4
    assert 0 < linked[2] < 300 * 500 * 4
    sim.assert_quiescent()


@late
@pytest.mark.parametrize("direct", [False, True])
def test_a_file_that_is_written_over_keeps_nothing(sim, tmp_path, monkeypatch, direct):
    """Nor between what one owner has and what the next."""
    if file_system(tmp_path.stat().st_dev) not in RECYCLED_FILE_SYSTEMS:
        pytest.skip("nothing is written over on this file system")
    monkeypatch.setattr(recycling, "RECYCLED_MIN_NBYTES", 1000)
    variables = state(sim)
    with (
        Saver(variables, max_to_keep=1, direct_io=direct) as new,
        Saver(variables, max_to_keep=1, direct_io=direct, recycle=True) as over,
    ):
        for step in range(4):
            for spare in tmp_path.glob("over-*-tmp"):
                spare.write_bytes(b"\xff" * spare.stat().st_size)
            change(variables, step + 1)
            files = []
            for name, saver in (("new", new), ("over", over)):
                saver.save(tmp_path / name, step, latest_filename=name)
                files.append((tmp_path / f"{name}-{step}.data-00000-of-00001").read_bytes())
            assert files[0] == files[1]
            assert len(list(tmp_path.glob("over-*-tmp"))) == (step > 0)
