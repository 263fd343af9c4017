"""MusicRL-JAX: finetune text-to-music models on what listeners like.

import musicrl_jax as musicrl

system = musicrl.load("runs/quickstart/ru")
wav = system.generate(["a slow waltz on a harp"], seed=0)  # f32 [B, C, N]
"""

from typing import Any

__all__ = ["System", "load"]


def __getattr__(name: str) -> Any:
    """Imports `load` and `System` on first use, since jax takes seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from musicrl_jax import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
