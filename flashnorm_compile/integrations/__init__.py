"""Private training in loops that exist already. Each module needs the library that it is named after.

``load_config``              options from a TOML file, for loops that can only name the backend
``transformers``             ``PrivacyCallback`` for Hugging Face's ``Trainer``
``lightning``                ``PrivacyCallback`` for Lightning's ``Trainer``
"""

from .toml import load_config

__all__ = ["load_config"]
