import platform
import subprocess
import sys
from dataclasses import replace

import pytest

from enginecache.errors import ToolchainError
from enginecache.host.toolchain import (
    NAMEABLE_COMPUTE_CAPABILITIES,
    PORTABLE_COMPUTE_CAPABILITIES,
    PackagePlaces,
    Toolchain,
    inspect_toolchains,
    installed_toolchains,
    supported_targets,
)

RUNTIME_12 = ("nvidia-cuda-runtime-cu12",)
PIP_10 = {
    "tensorrt": "10.16.1.11",
    "tensorrt_cu12": "10.16.1.11",
    "tensorrt_cu12_bindings": "10.16.1.11",
    "tensorrt_cu12_libs": "10.16.1.11",
}
RTX = {
    "tensorrt_rtx_cu13": "1.7.1.116",
    "tensorrt_rtx_cu13_bindings": "1.7.1.116",
    "tensorrt_rtx_cu13_libs": "1.7.1.116",
}
CONTAINER = """\
Package: libc6
Status: install ok installed
Version: 2.36-9

Package: libnvinfer10
Status: install ok installed
Maintainer: cudatools <cudatools@nvidia.com>
Version: 10.9.0.34-1+cuda12.8
Description: TensorRT runtime libraries

Package: libnvinfer-plugin10
Status: install ok installed
Version: 10.9.0.34-1+cuda13.0
"""


class Site:
    """A folder that looks like site-packages, and a dpkg status file."""

    def __init__(self, folder):
        self.folder = folder / "site-packages"
        self.folder.mkdir(parents=True)
        self.status = folder / "status"
        self.places = PackagePlaces((str(self.folder),), self.status)

    def add(self, packages, requires=(), module=None):
        for name, version in packages.items():
            info = self.folder / f"{name}-{version}.dist-info"
            info.mkdir()
            lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
            lines += [f"Requires-Dist: {line}" for line in requires if name.endswith("libs")]
            (info / "METADATA").write_text("\n".join(lines) + "\n")
        if module:
            package = self.folder / module
            package.mkdir(exist_ok=True)
            (package / "__init__.py").write_text("raise AssertionError('imported')\n")
        return self

    def problem(self, flavour="tensorrt", cuda_major=None):
        finding = self.inspect(flavour, cuda_major)
        assert finding.toolchain is None
        return ToolchainError(finding.problem, finding.fix)

    def inspect(self, flavour, cuda_major=None):
        (finding,) = [one for one in inspect_toolchains(cuda_major, self.places) if one.flavour == flavour]
        return finding


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def _found(site, flavour="tensorrt", cuda_major=None):
    finding = site.inspect(flavour, cuda_major)
    toolchain = finding.toolchain
    assert toolchain is not None, finding
    return toolchain.version, toolchain.cuda_major


@pytest.mark.parametrize("major", [12, 13])
def test_pip_tensorrt_10_tells_its_version_and_cuda(site, major):
    packages = {name.replace("cu12", f"cu{major}"): version for name, version in PIP_10.items()}
    assert _found(site.add(packages, module="tensorrt")) == ("10.16.1.11", major)


def test_pip_tensorrt_8_tells_its_cuda_by_the_requirements_of_its_libraries(site):
    site.add(
        {"tensorrt": "8.6.1.post1", "tensorrt_libs": "8.6.1", "tensorrt_bindings": "8.6.1"}, RUNTIME_12, "tensorrt"
    )
    assert _found(site) == ("8.6.1", 12)


def test_container_tells_its_cuda_by_dpkg(site):
    site.add({"tensorrt": "10.9.0.34"}, module="tensorrt").status.write_text(CONTAINER)
    assert _found(site) == ("10.9.0.34", 12)


def test_debian_package_of_tensorrt_8_matches_a_version_without_build_number(site):
    site.add({"tensorrt": "8.6.1"}, module="tensorrt")
    site.status.write_text("Package: libnvinfer8\nStatus: install ok installed\nVersion: 8.6.1.6-1+cuda12.0\n")
    assert _found(site) == ("8.6.1", 12)


@pytest.mark.parametrize(
    "status",
    [
        None,
        "",
        CONTAINER.replace("10.9.0.34", "10.9.0.3"),
        CONTAINER.replace("10.9.0.34", "10.9.0.340"),
        CONTAINER.replace("install ok installed\nMaintainer", "deinstall ok config-files\nMaintainer"),
        CONTAINER.replace("+cuda12.8", ""),
    ],
)
def test_cuda_that_no_package_names_is_a_problem_that_a_setting_fixes(site, status):
    site.add({"tensorrt": "10.9.0.34"}, module="tensorrt")
    if status is not None:
        site.status.write_text(status)
    error = site.problem()
    assert "the CUDA version of" in error.what
    assert "ENGINECACHE_CUDA_MAJOR=12" in error.fix
    assert _found(site, cuda_major=13) == ("10.9.0.34", 13)


def test_libraries_for_two_cudas_in_dpkg_tell_nothing(site):
    twice = CONTAINER + "\n" + CONTAINER.replace("libnvinfer10", "libnvinfer11").replace("12.8", "13.0")
    site.add({"tensorrt": "10.9.0.34"}, module="tensorrt").status.write_text(twice)
    assert "the CUDA version of" in site.problem().what
    assert _found(site, cuda_major=12) == ("10.9.0.34", 12)


def test_setting_does_not_overrule_what_the_packages_tell(site):
    assert _found(site.add(RTX, module="tensorrt_rtx"), "tensorrt-rtx", cuda_major=12) == ("1.7.1.116", 13)


def test_rtx_is_found_and_is_not_taken_for_tensorrt(site):
    site.add(RTX | {"tensorrt_rtx": "1.7.1.116"}, module="tensorrt_rtx")
    assert _found(site, "tensorrt-rtx") == ("1.7.1.116", 13)
    assert site.problem("tensorrt").what == "tensorrt is not installed"


def test_libraries_of_tensorrt_in_dpkg_tell_nothing_about_rtx(site):
    site.add({"tensorrt_rtx": "10.9.0.34"}, module="tensorrt_rtx").status.write_text(CONTAINER)
    assert "the CUDA version of" in site.problem("tensorrt-rtx").what


def test_names_are_compared_in_their_normal_form(site):
    site.add({"TensorRT.cu13_bindings": "10.16.1.11", "TensorRT": "10.16.1.11"}, module="tensorrt")
    assert _found(site) == ("10.16.1.11", 13)


def test_bindings_alone_are_not_an_installation(site):
    site.add({"tensorrt_cu13_bindings": "11.4.0.106"}, module="tensorrt_bindings")
    error = site.problem()
    assert "tensorrt-cu13-bindings 11.4.0.106 has bindings, but the libraries are missing" in error.what
    assert "pip install tensorrt nvidia-ml-py" in error.fix


@pytest.mark.parametrize(("flavour", "package"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt-rtx-cu13")])
def test_missing_flavour_names_its_package(site, flavour, package):
    error = site.problem(flavour)
    assert error.what == f"{flavour} is not installed"
    assert f"pip install {package} " in error.fix


def test_folder_of_that_name_is_not_an_installation(site):
    (site.folder / "tensorrt").mkdir()
    assert site.problem().what == "tensorrt is not installed"


def test_module_without_a_package_has_no_version(site):
    site.add({}, module="tensorrt")
    assert "no package names its version" in site.problem().what


@pytest.mark.parametrize(
    "other",
    [{"tensorrt_cu12_bindings": "10.1.0"}, {"tensorrt_cu12_libs": "10.1.0"}, {"tensorrt": "10.1.0"}],
)
def test_packages_that_disagree_are_a_problem_and_not_a_guess(site, other):
    error = site.add(PIP_10 | other, module="tensorrt").problem()
    assert "disagree" in error.what
    assert "10.1.0" in error.what
    assert "10.16.1.11" in error.what
    assert "pip uninstall -y" in error.fix


def test_remains_of_an_upgrade_in_one_folder_are_a_problem(site):
    site.add(PIP_10, module="tensorrt").add({"tensorrt_cu12_bindings": "10.0.1"})
    assert "disagree" in site.problem().what


def test_remains_of_a_broken_removal_are_a_problem(site):
    (site.add(PIP_10, module="tensorrt").folder / "tensorrt_cu12_libs-10.0.1.dist-info").mkdir()
    assert "tensorrt-cu12-libs of no version" in site.problem().what


def test_packages_for_two_cudas_are_a_problem(site):
    error = site.add(PIP_10 | {"tensorrt_cu13_bindings": "10.16.1.11"}, module="tensorrt").problem(cuda_major=12)
    assert "several CUDA versions" in error.what
    assert "tensorrt-cu13-bindings" in error.fix


def test_later_folder_does_not_count_where_an_earlier_one_has_the_package(tmp_path):
    venv = Site(tmp_path / "venv").add(PIP_10, module="tensorrt")
    system = Site(tmp_path / "system").add({"tensorrt": "10.9.0.34"}, module="tensorrt")
    venv.places = PackagePlaces((*venv.places.folders, *system.places.folders), venv.status)
    assert _found(venv) == ("10.16.1.11", 12)


def test_platform_is_written_in_one_spelling(site, monkeypatch):
    site.add(RTX, module="tensorrt_rtx")
    for machine, expected in {"AMD64": "x86_64", "x86_64": "x86_64", "arm64": "aarch64", "aarch64": "aarch64"}.items():
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(platform, "system", lambda: "Linux")
        toolchain = site.inspect("tensorrt-rtx").toolchain
        assert (toolchain.os, toolchain.cpu) == ("linux", expected)


def test_findings_name_both_flavours_and_why_one_is_not_usable(site):
    site.add(RTX, module="tensorrt_rtx")
    tensorrt, rtx = inspect_toolchains(places=site.places)
    assert (tensorrt.flavour, tensorrt.toolchain) == ("tensorrt", None)
    assert tensorrt.problem
    assert tensorrt.fix
    assert rtx.toolchain.version == "1.7.1.116"
    assert (rtx.problem, rtx.fix) == ("", "")


def test_installed_toolchains_have_tensorrt_first(site):
    site.add(RTX, module="tensorrt_rtx").add(PIP_10, module="tensorrt")
    assert [t.flavour for t in installed_toolchains(places=site.places)] == ["tensorrt", "tensorrt-rtx"]


TOOLCHAIN = Toolchain("tensorrt-rtx", "1.7.1.116", 13, "linux", "x86_64")


@pytest.mark.parametrize("version", ["1.0.0.21", "1.7.0", "1.7.99.1"])
def test_targets_of_a_known_rtx_are_known_before_a_build(version):
    assert supported_targets(replace(TOOLCHAIN, version=version)) == set(NAMEABLE_COMPUTE_CAPABILITIES)
    assert (9, 0) not in NAMEABLE_COMPUTE_CAPABILITIES


@pytest.mark.parametrize(
    ("flavour", "version"), [("tensorrt-rtx", "1.8.0.1"), ("tensorrt-rtx", "2.0"), ("tensorrt", "1.0.0")]
)
def test_targets_of_others_are_left_to_the_builder(flavour, version):
    assert supported_targets(replace(TOOLCHAIN, flavour=flavour, version=version)) is None


def test_portable_plan_starts_at_ampere():
    assert [str(c) for c in PORTABLE_COMPUTE_CAPABILITIES] == ["8.0", "8.6", "8.9", "12.0", "12.1"]


def _is_rtx_here():
    return inspect_toolchains()[1].toolchain is not None


@pytest.mark.rtx
@pytest.mark.skipif(not _is_rtx_here(), reason="probe: TensorRT-RTX is not installed")
def test_version_found_is_the_one_that_the_real_library_reports_and_finding_it_imports_nothing():
    code = (
        "import sys\n"
        "from enginecache.host.toolchain import *\n"
        "found = inspect_toolchains()[1].toolchain\n"
        "assert not [name for name in sys.modules if name.startswith('tensorrt')]\n"
        "import tensorrt_rtx\n"
        "assert found.version == tensorrt_rtx.__version__, (found, tensorrt_rtx.__version__)\n"
        "members = tensorrt_rtx.ComputeCapability.__members__\n"
        "names = {f'SM{c.major}{c.minor}' for c in NAMEABLE_COMPUTE_CAPABILITIES}\n"
        "assert {name for name in members if name.startswith('SM')} == names, list(members)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
