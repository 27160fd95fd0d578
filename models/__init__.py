"""Model families, one file per Hugging Face model_type family. Installed as `qjax.models`."""

if not __name__.startswith("qjax."):  # a second copy of every module would be imported
    raise ImportError(
        f"import qjax.{__name__}: {__name__} is a folder of the qjax package, not a package"
    )
