"""What pyproject.toml cannot say: a wheel holds conf/ as bt/conf, where bt.config.entry looks for it."""

from pathlib import Path
from shutil import copytree, rmtree

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # a clone reads its own
            target = Path(self.build_lib, "bt", "conf")
            rmtree(target, ignore_errors=True)
            copytree("conf", target)


setup(cmdclass={"build_py": BuildWithConf})
