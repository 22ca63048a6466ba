"""Settings: one file, the environment, the command line; nothing unknown passes."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import pytest
import yaml

from concepts.runtimes import Runtime
from service.cli import environment
from service.settings import Limits, ModelSettings, Settings, SettingsError, load_settings

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


def test_the_command_line_comes_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        tmp_path, "repository: here\nport: 1\nmetrics_port: 11\nbatch_limit: 3\nlimits: {top_k: 4, pixels: 5}\n"
    )
    monkeypatch.setenv("WHENCE_SERVE_PORT", "2")
    monkeypatch.setenv("WHENCE_SERVE_METRICS_PORT", "12")
    monkeypatch.setenv("WHENCE_SERVE_LIMITS__TOP_K", "40")
    settings = load_settings(path, port=None, metrics_port=13)
    assert (settings.port, settings.metrics_port, settings.batch_limit) == (2, 13, 3)
    assert (settings.limits.top_k, settings.limits.pixels) == (40, 5)
    assert settings.repository == str(Path("here").resolve())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("repository: x\nprot: 3", "prot: unknown setting"),
        ("repository: x\nlimits: {topk: 3}", "limits.topk: unknown setting"),
        ("port: 3", "repository: is required"),
        ("repository: x\nport: many", "port: .*integer"),
        ("repository: x\nport: 99999", "port: .*65535"),
        ("repository: x\nport: 5\nmetrics_port: 5", "must differ"),
        ("repository: x\ndefault_deadline_s: 100", "must not exceed"),
        ("repository: x\ningress_mode: nginx", "ingress_mode: .*haproxy"),
        ("repository: x\nruntime: onnx\nprecision: bfloat16", "use runtime torch for bfloat16"),
        ("repository: x\nmodels: {a: {runtime: onnx, compile: true}}", "nothing to compile"),
        ("repository: x\nmodels: {a: {runtme: onnx}}", r"models\.a\.runtme: unknown setting"),
        ("- a\n- b", "key: value"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint) as problem:
        load_settings(write(tmp_path, text))
    assert "\n" not in str(problem.value)


def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHENCE_SERVE_PROT", "1")
    with pytest.raises(SettingsError, match="WHENCE_SERVE_PROT"):
        load_settings(repository="x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml"):
        load_settings(tmp_path / "none.yaml")


def test_settings_reach_other_processes_whole() -> None:
    settings = load_settings(repository="s3://bucket/prefix", limits={"top_k": 7})
    assert settings.repository == "s3://bucket/prefix"
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_every_setting_is_documented() -> None:
    for model in (Limits, ModelSettings, Settings):
        source = inspect.getsource(model).splitlines()
        for name in model.model_fields:
            line = next(i for i, text in enumerate(source) if text.startswith(f"    {name}: "))
            assert source[line + 1].startswith('    """'), name


def test_single_models_may_have_another_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "repository: x\nprecision: bfloat16\nmodels: {a: {runtime: onnx, precision: float32}}")
    settings = load_settings(path)
    assert settings.runtime_of("a") == Runtime("onnx", "float32")
    assert settings.runtime_of("b") == Runtime("torch", "bfloat16")
    monkeypatch.setenv("WHENCE_SERVE_MODELS", '{"b": {"compile": true}}')
    assert load_settings(path).runtime_of("b") == Runtime("torch", "bfloat16", compile=True)


def test_the_shipped_file_is_valid_and_agrees_with_the_defaults() -> None:
    path = ROOT / "deploy" / "serve.yaml"
    settings = load_settings(path)
    given = yaml.safe_load(path.read_text())
    for name in given.keys() - {"repository"}:
        assert getattr(settings, name) == getattr(Settings(repository="x"), name), name


def test_ray_takes_orders_from_our_own_processes_alone(tmp_path: Path) -> None:
    local = environment(Settings(repository=str(tmp_path)))
    assert local["RAY_AUTH_MODE"] == "token"
    assert len(local["RAY_AUTH_TOKEN"]) == 64
    assert local["RAY_AUTH_TOKEN"] != environment(Settings(repository=str(tmp_path)))["RAY_AUTH_TOKEN"]
    cluster = environment(Settings(repository=str(tmp_path), ray_address="ray://cluster:10001"))
    assert not [name for name in cluster if name.startswith("RAY_AUTH")]  # as the cluster has it
