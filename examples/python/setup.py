from setuptools import setup

setup(cffi_modules=["build_besa.py:ffibuilder"])
