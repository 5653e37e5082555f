import pytest

SHELLS = pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])


@pytest.fixture
def complete(cli, monkeypatch):
    """The completions of a line, asked as the script that a shell loads asks."""

    def ask(shell, line):
        asked = {
            "bash": {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))},
            "zsh": {"_TYPER_COMPLETE_ARGS": line},
            "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
        }[shell]
        with monkeypatch.context() as patch:
            for name, value in {"_ENGINECACHE_COMPLETE": f"complete_{shell}", **asked}.items():
                patch.setenv(name, value)
            ran = cli()
        assert (ran.code, ran.err) == (0, "")
        return ran.out

    return ask


@SHELLS
def test_commands_options_and_values_are_completed(shell, complete):
    assert "explain" in complete(shell, "enginecache ex")
    assert "upgrade" in complete(shell, "enginecache db u")
    options = complete(shell, "enginecache get --o")
    assert "--opt-shapes" in options
    assert "--output" in options
    assert "tensorrt-rtx" in complete(shell, "enginecache get m.onnx --backend tens")
    assert "sm_89" in complete(shell, "enginecache get m.onnx --target sm_8")


@SHELLS
def test_keys_are_completed_from_the_folder_that_is_meant(shell, complete, cli, model, folder, tmp_path, monkeypatch):
    key = cli("get", model, "--dim", "batch=1", "--json").json["key"]
    for command in ("show", "path", "pin", "unpin", "rm"):
        assert key[:16] in complete(shell, f"enginecache {command} {key[:3]}")
    monkeypatch.setenv("ENGINECACHE_DIR", str(tmp_path / "other"))
    assert key[:16] in complete(shell, f"enginecache pin --dir {folder} {key[:3]}")
    assert key[:16] not in complete(shell, f"enginecache show {key[:3]}")
    assert not (tmp_path / "other").exists()


@SHELLS
def test_cache_that_cannot_be_read_completes_nothing(shell, complete, cli, folder):
    (folder / "registry.sqlite").write_text("no database" * 100)
    assert "0" not in complete(shell, "enginecache show 0").replace("0 ", "")
    (folder / "registry.sqlite").unlink()


@SHELLS
def test_script_is_printed(shell, cli, monkeypatch):
    monkeypatch.setenv("_ENGINECACHE_COMPLETE", f"source_{shell}")
    ran = cli()
    assert ran.code == 0
    assert f"_ENGINECACHE_COMPLETE=complete_{shell}" in ran.out
