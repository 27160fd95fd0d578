"""The list of packages; everything else is in pyproject.toml.

`packages.find` there would see the two mapped packages through the links qjax/models and qjax/pallas_kernels,
which an sdist cannot hold: a wheel built from the sdist would lack them.
"""

from setuptools import find_packages, setup

found = find_packages(include=["qjax", "qjax.*"])
setup(packages=sorted({*found, "qjax.models", "qjax.pallas_kernels"}))
