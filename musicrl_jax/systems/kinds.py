"""The models that this installation knows: the parts of every system, and those that judge clips."""

from musicrl_jax.models.rewards import PreferenceConfig, QualityConfig
from musicrl_jax.systems import folder

JUDGES = QualityConfig, PreferenceConfig


def config_class(name: str, where: str) -> type:
    """Returns a model's config class by its name, as manifests hold it.

    Raises ValueError, with `where` it stands, if it is none of a registered system or a judge.
    """
    known = {judge.__name__: judge for judge in JUDGES}
    for kind in folder.KINDS:
        known |= {part.__name__: part for part in folder.system_class(kind, where).PARTS.values()}
    if name not in known:
        raise ValueError(f"{where} is a {name}, which is none of {', '.join(sorted(known))}")
    return known[name]
