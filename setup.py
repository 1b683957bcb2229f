"""What pyproject.toml cannot say: static programs are built from C, and the launchers are installed as they are."""

import shutil
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

from distutils.command.build_scripts import build_scripts  # isort: skip  (a module that setuptools brings)

sys.path.insert(0, str(Path(__file__).parent / "scripts"))
import native


class BuildNative(Command):
    """Compile ovt/_bin in the source tree, where build_py takes it from as package data."""

    user_options = []
    editable_mode = False

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        native.build()

    def get_source_files(self) -> list[str]:
        return ["scripts/native.py", *(source for sources, _ in native.PROGRAMS.values() for source in sources)]

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands = [("build_native", None), *build.sub_commands]


class VerbatimScripts(build_scripts):
    """setuptools and pip write an interpreter of their own into scripts; ours is chosen with its flags, or is none."""

    def copy_scripts(self) -> tuple[list[str], list[str]]:
        self.mkpath(self.build_dir)
        copies = [shutil.copy(script, self.build_dir) for script in self.scripts]
        return copies, copies


class WithPrograms(Distribution):
    """A distribution that is built for one architecture, though it has no extension module."""

    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    """Any Python 3 on this architecture: the programs are static and the Python is plain."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    distclass=WithPrograms,
    cmdclass={
        "build": Build,
        "build_native": BuildNative,
        "build_scripts": VerbatimScripts,
        "bdist_wheel": PlatformWheel,
    },
)
