from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from enginecache.config import Config, config_path, parse_duration_s
from enginecache.errors import ConfigError, OptionError


@pytest.fixture
def write(tmp_path):
    """Writes a configuration file; the environment that names it."""

    def write_file(text):
        path = tmp_path / "config.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return {"ENGINECACHE_CONFIG": str(path)}

    return write_file


def test_defaults_are_the_users_cache_folder_and_no_limits(tmp_path):
    config = Config.load({})
    assert config == Config(dir=tmp_path / "xdg-cache/enginecache")
    assert (config.shared, config.backend, config.timeout_s, config.max_size_bytes) == ("", "auto", None, None)
    assert (config.grace_s, config.cuda_major) == (86400.0, None)
    with pytest.raises(FrozenInstanceError):
        config.dir = Path("/")


FILE = """
dir = "/from/file"
shared = "group"
backend = "tensorrt"
timeout = "30m"
max_size = "20GiB"
grace = 60
cuda_major = 12
"""


def test_file_wins_over_defaults(write):
    assert Config.load(write(FILE)) == Config(
        dir=Path("/from/file"),
        shared="group",
        backend="tensorrt",
        timeout_s=1800.0,
        max_size_bytes=20 << 30,
        grace_s=60.0,
        cuda_major=12,
    )


def test_environment_wins_over_the_file(write):
    environ = {
        "ENGINECACHE_DIR": "/from/environ",
        "ENGINECACHE_BACKEND": "tensorrt-rtx",
        "ENGINECACHE_TIMEOUT": "45s",
        "ENGINECACHE_MAX_SIZE": "1048576",
        "ENGINECACHE_GRACE": "2h",
        "ENGINECACHE_CUDA_MAJOR": "13",
    }
    assert Config.load({**write(FILE), **environ}) == Config(
        dir=Path("/from/environ"),
        shared="group",
        backend="tensorrt-rtx",
        timeout_s=45.0,
        max_size_bytes=1 << 20,
        grace_s=7200.0,
        cuda_major=13,
    )


def test_arguments_win_over_all_and_none_is_not_given(write):
    environ = {**write(FILE), "ENGINECACHE_DIR": "/from/environ"}
    config = Config.load(environ, dir="/from/argument", timeout_s=1.0, backend=None)
    assert (config.dir, config.timeout_s, config.backend) == (Path("/from/argument"), 1.0, "tensorrt")


def test_empty_variable_is_one_that_is_not_set(write):
    assert Config.load({**write(FILE), "ENGINECACHE_DIR": "", "ENGINECACHE_SHARED": ""}).dir == Path("/from/file")


def test_folder_is_absolute_and_knows_the_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert Config.load({}, dir="below").dir == tmp_path / "below"
    assert Config.load({}, dir=Path("below")).dir == tmp_path / "below"
    assert Config.load({"ENGINECACHE_DIR": "~/x"}).dir == Path("/home/someone/x")


def test_file_is_the_named_one_or_the_users(tmp_path):
    assert config_path({}) == tmp_path / "xdg-config/enginecache/config.toml"
    assert config_path({"ENGINECACHE_CONFIG": "/x.toml"}) == Path("/x.toml")
    users = config_path({})
    users.parent.mkdir(parents=True)
    users.write_text('backend = "tensorrt"')
    assert Config.load({}).backend == "tensorrt"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('dri = "/x"', "dri in .*: there is no such setting"),
        ("[cache]\ndir = 1", "no such setting"),
        ("shared = true", "neither a text nor a number"),
        ('dir = ["/x"]', "neither a text nor a number"),
        ('dir = ""', "empty path"),
        ('dir = "~nobody-of-this-name/x"', "no such user"),
        ('backend = "cuda"', "'cuda' is not one of 'auto', 'tensorrt', 'tensorrt-rtx'"),
        ('shared = "all"', "'all' is not one of '', 'group'"),
        ('timeout = "soon"', "timeout in .*: 'soon' is not a duration"),
        ("timeout = -1", "'-1' is not a duration"),
        ("timeout = nan", "'nan' is not a duration"),
        ('max_size = "big"', "'big' is not a size"),
        ("cuda_major = 12.4", "'12.4' is not a major version"),
        ("cuda_major = 0", "'0' is not a major version"),
        ("dir = ", "cannot be read"),
        (b"dir = '\xff'", "cannot be read"),
    ],
)
def test_bad_file_is_an_error_that_names_file_and_setting(write, text, what):
    environ = write(text)
    with pytest.raises(ConfigError, match=what) as caught:
        Config.load(environ)
    assert environ["ENGINECACHE_CONFIG"] in caught.value.what
    assert caught.value.fix


def test_named_file_must_be_there_and_be_a_file(tmp_path):
    with pytest.raises(ConfigError, match="does not exist") as caught:
        Config.load({"ENGINECACHE_CONFIG": str(tmp_path / "none.toml")})
    assert "ENGINECACHE_CONFIG" in caught.value.fix
    with pytest.raises(ConfigError, match="cannot be read"):
        Config.load({"ENGINECACHE_CONFIG": str(tmp_path)})


def test_bad_variable_is_named():
    with pytest.raises(ConfigError, match="ENGINECACHE_TIMEOUT: 'soon' is not a duration") as caught:
        Config.load({"ENGINECACHE_TIMEOUT": "soon"})
    assert "30m" in caught.value.fix


@pytest.mark.parametrize("given", [{"dir": ""}, {"backend": "cuda"}, {"shared": "all"}])
def test_bad_argument_is_the_same_error(given):
    with pytest.raises(ConfigError):
        Config.load({}, **given)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30m", 1800.0),
        ("45s", 45.0),
        ("2h", 7200.0),
        ("30d", 2_592_000.0),
        ("90", 90.0),
        ("0", 0.0),
        ("1.5H", 5400.0),
        (" 250 ms ", 0.25),
    ],
)
def test_durations_are_read(text, seconds):
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "1w", "-1", "1e3", "1h30m", "inf", "٣"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(OptionError, match="not a duration"):
        parse_duration_s(text)
