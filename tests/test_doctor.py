"""`unitok doctor`: the checks, and the cost of each missing part."""

import types


def test_doctor_reports_versions_and_costs(capsys):
    from open_unitok import doctor
    from open_unitok.cli import doctor as doctor_command

    doctor_command.run(None)
    out = capsys.readouterr().out
    assert "free memory" in out and "torch" in out and "flash-attn" in out
    assert set(doctor.tested_versions()) >= {"torch", "deepspeed", "transformers"}


def test_doctor_says_what_each_missing_thing_costs(monkeypatch):
    import torch

    from open_unitok import doctor
    from open_unitok.core import devices

    def absent(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    find_spec = doctor.importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(doctor.shutil, "which", lambda name: None)
        assert {c.name: c.cost for c in doctor.speed()}["deepspeed ops"].startswith("CPU offload")
        patch.setattr(doctor, "available_memory", lambda: 1.0e9)
        patch.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3e8))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.backends.mps, "is_available", lambda: False)
        patch.setattr(devices, "fast_bf16", lambda: False)
        patch.setattr(doctor, "importable", lambda name: False)
        patch.setattr(
            doctor.importlib.util, "find_spec", lambda n, *a: None if n == "deepspeed" else find_spec(n, *a)
        )
        patch.setattr(doctor.importlib.metadata, "version", absent)
        patch.delenv("GOMP_SPINCOUNT", raising=False)
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        costs = {c.name: c.cost for c in (*doctor.package_versions(), *doctor.machine(), *doctor.speed())}
    said = {
        "free memory": "2.7 GB",
        "free disk": "0.4 GB",
        "gpu": "paper-scale training",
        "bf16": "fp32",
        "flash-attn": "SDPA",
        "deepspeed": "open-unitok[train]",
        "OpenMP waiting": "third of their speed",
        "torch": "tested with",
    }
    for name, words in said.items():
        assert words in costs[name], (name, costs[name])


def test_doctor_says_what_is_tested_of_each_device(capsys):
    import pytest

    from open_unitok.cli import doctor as doctor_command
    from open_unitok.core.devices import check_device
    from open_unitok.core.errors import UserError
    from open_unitok.doctor import TESTED

    doctor_command.run(None)
    out = capsys.readouterr().out
    assert all(f"- {device:<18} {text}" in out for device, text in TESTED.items())
    # the devices that the command line names, and one that it refuses
    with pytest.raises(UserError) as error:
        check_device("xpu")
    assert "not supported" in TESTED["xpu"] and "xpu" in str(error.value)
    with pytest.raises(UserError, match="cpu, cuda, cuda:N or mps"):
        check_device("tpu:x")


def test_cached_files_are_free_memory_in_a_container(tmp_path):
    from open_unitok.core import memory

    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    limit.write_text("6000\n")
    used.write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 3500\nactive_file 600\n")
    assert memory.container_memory_left(limit, used, "inactive_file") == 4500
    limit.write_text("max\n")
    assert memory.container_memory_left(limit, used, "inactive_file") > 2**60
