import os
import stat
import tempfile
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from users import as_user

from enginecache.config import MAX_FILE_BYTES, Config, config_path, unknown_variables
from enginecache.errors import ConfigError, OptionError
from enginecache.files.units import parse_duration_s

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="probe: not root, so no other user can be")


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
    assert (config.keep_recent_s, config.grace_s, config.cuda_major) == (600.0, 86400.0, None)
    with pytest.raises(FrozenInstanceError):
        config.dir = Path("/")


FILE = """
dir = "/from/file"
shared = "group"
backend = "tensorrt"
timeout = "30m"
max_size = "20GiB"
keep_recent = "15m"
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
        keep_recent_s=900.0,
        grace_s=60.0,
        cuda_major=12,
    )


def test_environment_wins_over_the_file(write):
    environ = {
        "ENGINECACHE_DIR": "/from/environ",
        "ENGINECACHE_BACKEND": "tensorrt-rtx",
        "ENGINECACHE_TIMEOUT": "45s",
        "ENGINECACHE_MAX_SIZE": "1048576",
        "ENGINECACHE_KEEP_RECENT": "0",
        "ENGINECACHE_GRACE": "2h",
        "ENGINECACHE_CUDA_MAJOR": "13",
    }
    assert Config.load({**write(FILE), **environ}) == Config(
        dir=Path("/from/environ"),
        shared="group",
        backend="tensorrt-rtx",
        timeout_s=45.0,
        max_size_bytes=1 << 20,
        keep_recent_s=0.0,
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


@pytest.mark.parametrize(
    ("text", "is_on"), [("true", True), ("false", False), ('"yes"', True), ('"Off"', False), ("1", True)]
)
def test_a_switch_is_read_as_toml_and_as_words(write, text, is_on):
    assert Config.load(write(f"follow_links = {text}")).follow_links is is_on
    assert Config.load({"ENGINECACHE_FOLLOW_LINKS": text.strip('"')}).follow_links is is_on


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
        ("shared = true", "neither a string nor a number"),
        ('dir = ["/x"]', "neither a string nor a number"),
        ('dir = ""', "empty path"),
        ('dir = "~nobody-of-this-name/x"', "a user that is not known"),
        ('backend = "cuda"', "'cuda' is not one of 'auto', 'tensorrt', 'tensorrt-rtx'"),
        ('shared = "all"', "'all' is not one of '', 'group'"),
        ('timeout = "soon"', "timeout in .*: 'soon' is not a duration"),
        ("timeout = -1", "'-1' is not a duration"),
        ("timeout = nan", "'nan' is not a duration"),
        ('max_size = "big"', "'big' is not a size"),
        ("cuda_major = 12.4", "'12.4' is not a major version"),
        ("cuda_major = 0", "'0' is not a major version"),
        ('follow_links = "perhaps"', "'perhaps' is neither yes nor no"),
        ("follow_links = [true]", "neither a string nor a number"),
        ('dir = "/a\\u0000b"', "a path with a NUL character"),
        ("a = " + "[" * 50_000, "nested too deeply"),
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
    assert len(caught.value.what) < 300


def test_named_file_must_be_there_and_be_a_file(tmp_path):
    with pytest.raises(ConfigError, match="does not exist") as caught:
        Config.load({"ENGINECACHE_CONFIG": str(tmp_path / "none.toml")})
    assert "ENGINECACHE_CONFIG" in caught.value.fix
    with pytest.raises(ConfigError, match="cannot be read"):
        Config.load({"ENGINECACHE_CONFIG": str(tmp_path)})


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (os.mkfifo, "it is a pipe, not a regular file"),
        (os.mkdir, "it is a folder, not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a regular file"),
        (lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), "it is a socket, not a regular file"),
        (lambda path: path.write_text("# " + "x" * MAX_FILE_BYTES), f"more than {MAX_FILE_BYTES} bytes"),
        (lambda path: path.write_text('dir = "/x"', "utf-16"), "it is UTF-16, and must be UTF-8"),
        (lambda path: path.write_text('dir = "/\u00e9"', "latin-1"), "it is not UTF-8: see byte 9"),
        (lambda path: path.write_text("a." * 30_000 + "b = 1"), "a line of it has more than 200 dots"),
        (lambda path: path.write_text("a = {" + "b." * 30_000 + "c = 1}"), "a line of it has more than 200 dots"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
)
def test_a_settings_file_that_is_no_small_regular_file_is_an_error_and_hangs_nothing(tmp_path, monkeypatch, make, what):
    monkeypatch.chdir(tmp_path)
    make(Path("config.toml"))
    with pytest.raises(ConfigError, match=what) as caught:
        Config.load({"ENGINECACHE_CONFIG": "config.toml"})
    assert "config.toml" in caught.value.what
    assert "ENGINECACHE_CONFIG" in caught.value.fix


def test_the_null_device_as_settings_file_means_none():
    assert Config.load({"ENGINECACHE_CONFIG": "/dev/null"}) == Config.load({})


def test_a_byte_order_mark_and_windows_line_ends_are_read(write):
    assert Config.load(write(b'\xef\xbb\xbfbackend = "tensorrt"\r\nmax_size = 1\r\n')).max_size_bytes == 1


@pytest.mark.parametrize(
    ("text", "nearest"), [("max_sise = 1", "max_size"), ("grase = 1", "grace"), ("cudamajor = 12", "cuda_major")]
)
def test_an_unknown_setting_is_an_error_that_names_the_nearest(write, text, nearest):
    with pytest.raises(ConfigError, match="there is no such setting") as caught:
        Config.load(write(text))
    assert caught.value.fix == f"Did you mean {nearest}?"
    with pytest.raises(ConfigError) as caught:
        Config.load(write("colour = 1"))
    assert "max_size" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("ENGINECACHE_MAXSIZE", "ENGINECACHE_MAX_SIZE"),
        ("ENGINECACHE_BACKEN", "ENGINECACHE_BACKEND"),
        ("ENGINECACHE_DIRECTORY", "ENGINECACHE_DIR"),
        ("ENGINECACHE_CONFIGURATION", "ENGINECACHE_CONFIG"),
    ],
)
def test_an_unknown_variable_is_named_with_the_nearest(name, nearest):
    (found,) = unknown_variables({name: "1", "ENGINECACHE_DIR": "/x", "PATH": "/bin"})
    assert found == f"{name} is not a variable of enginecache and has no effect. Did you mean {nearest}?"


def test_an_unknown_variable_like_no_other_is_named_with_all():
    (found,) = unknown_variables({"ENGINECACHE_XYZZY": "1"})
    assert "ENGINECACHE_MAX_SIZE" in found


@pytest.mark.parametrize(
    "name",
    [
        "ENGINECACHE_SERVICE_HOST",
        "ENGINECACHE_SERVICE_PORT_HTTP",
        "ENGINECACHE_PORT",
        "ENGINECACHE_PORT_80_TCP_ADDR",
        "ENGINECACHE_REGISTRY_SERVICE_PORT",
    ],
)
def test_variables_of_a_kubernetes_service_and_empty_ones_are_not_warned_of(name):
    assert unknown_variables({name: "10.0.0.1", "ENGINECACHE_FOO": ""}) == []


@pytest.fixture
def homeless(monkeypatch):
    """A user whom no database of users knows, without HOME and without XDG folders."""
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name)

    def work(home, function):
        def run():
            os.environ.pop("HOME", None)
            if home is not None:
                os.environ["HOME"] = home
            return function()

        return as_user(12345, 12345, run)

    return work


@needs_root
@pytest.mark.parametrize("home", [None, ""])
def test_without_a_home_all_works_where_the_folder_is_named(homeless, home):
    assert homeless(home, lambda: str(Config.load({"ENGINECACHE_DIR": "/x"}).dir)) == "/x"
    assert homeless(home, lambda: str(Config.load({}, dir="/x").dir)) == "/x"
    assert homeless(home, lambda: str(config_path({}))) == "None"


@needs_root
@pytest.mark.parametrize("home", [None, ""])
def test_without_a_home_and_a_named_folder_is_one_error_that_says_how_to_name_it(homeless, home):
    found = homeless(home, lambda: Config.load({}))
    assert found.startswith("ConfigError: there is no default cache folder: user 12345 has no home folder")
    assert "with dir or ENGINECACHE_DIR" in found


@needs_root
def test_another_users_closed_home_has_no_settings_file(homeless, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o700)
    for home in (str(tmp_path / "closed"), "/dev/null"):
        assert homeless(home, lambda: str(Config.load({"ENGINECACHE_DIR": "/x"}).dir)) == "/x"


@needs_root
def test_a_settings_file_of_ones_own_that_is_closed_is_an_error(homeless):
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        path = Path(home, ".config/enginecache/config.toml")
        path.parent.mkdir(parents=True)
        path.touch(mode=0o600)
        found = homeless(home, lambda: Config.load({"ENGINECACHE_DIR": "/x"}))
    assert found.startswith(f"ConfigError: the configuration file {path} cannot be read: Permission denied")


def test_where_the_folder_was_named_is_known(write):
    environ = write('dir = "/from/file"')
    assert Config.load({}).dir_from == ""
    assert Config.load(environ).dir_from == f"dir in {environ['ENGINECACHE_CONFIG']}"
    assert Config.load({**environ, "ENGINECACHE_DIR": "/x"}).dir_from == "ENGINECACHE_DIR"
    assert Config.load(environ, dir="/y").dir_from == "an argument"


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


@pytest.mark.parametrize("text", ["99999999999999d", "1" * 400, "36526d"])
def test_a_duration_of_more_than_a_hundred_years_is_refused(text):
    with pytest.raises(OptionError, match="a hundred years"):
        parse_duration_s(text)


@pytest.mark.parametrize("value", [1e300, float("nan"), float("inf"), -1, "1", True])
@pytest.mark.parametrize("name", ["timeout_s", "keep_recent_s", "grace_s", "failure_ttl_s"])
def test_a_number_of_seconds_that_is_none_is_refused(tmp_path, name, value):
    with pytest.raises(OptionError, match=name):
        Config(dir=tmp_path, **{name: value})
