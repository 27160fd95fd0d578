"""Mosaic GPU kernels: raw arrays in, raw arrays out. Installed as `qjax.pallas_kernels`."""

if not __name__.startswith("qjax."):  # a second copy of every module would be imported
    raise ImportError(
        f"import qjax.{__name__}: {__name__} is a folder of the qjax package, not a package"
    )
