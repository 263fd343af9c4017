"""The config classes of all models: parts of registered systems, and models that judge clips."""

from musicrl_jax.models.rewards import PreferenceConfig, QualityConfig
from musicrl_jax.systems import folder

JUDGES = QualityConfig, PreferenceConfig


def config_class(name: str, where: str) -> type:
    """Returns a model's config class by the name in its manifest.

    Raises ValueError, which starts with `where`, if neither a registered system nor a judge has it.
    """
    classes = list(JUDGES)
    for kind in folder.KINDS:
        classes += folder.system_class(kind, where).PARTS.values()
    by_name = {each.__name__: each for each in classes}
    if name not in by_name:
        raise ValueError(f"{where} is a {name}, which is none of {', '.join(sorted(by_name))}")
    return by_name[name]
