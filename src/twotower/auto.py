"""Registers two-tower checkpoints with transformers' Auto classes: the one effect of `import twotower`.

A released two-tower checkpoint and a plain Nemotron-H one have the same `model_type`, `nemotron_h`, and differ in
`architectures`. Without this registration, `AutoModelForCausalLM.from_pretrained` builds transformers' own class for a
two-tower checkpoint and leaves its weights random. Plain checkpoints load as before.

A checkpoint with another backbone has the `model_type` `two_tower`, which is added to transformers' configurations and
to its tables of models.

The registration replaces `auto_factory._get_model_class`, which selects the class. An entry in transformers' table of
classes is not enough: its keys are configuration classes, and `trust_remote_code` adds other classes of the same name.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in `twotower`

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
else:
    Loader = object  # importing `importlib.abc` would load a dozen modules

_FACTORY = "transformers.models.auto.auto_factory"
_CONFIGURATIONS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"
_CHOOSER = "_get_model_class"
# Marks objects that a registration adds. A string, because a reload of this module makes new classes and functions.
_MARK = "_twotower_registration"


def register() -> None:
    """Extends transformers now if it is imported, otherwise when it is imported. Further calls have no effect.

    The import hook remains, so that it also extends transformers after a second import or a reload.
    """
    if not any(hasattr(finder, _MARK) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FactoryHook())
    for name, extend in _EXTENDERS.items():
        if (module := sys.modules.get(name)) is not None:
            extend(module)


def _add_configuration(configurations: ModuleType) -> None:
    """Adds the configuration class of `model_type` `two_tower`."""
    from twotower.config import GENERIC_MODEL_TYPE, GenericTwoTowerConfig

    configurations.AutoConfig.register(GENERIC_MODEL_TYPE, GenericTwoTowerConfig, exist_ok=True)


class _LateModel(type):
    """The type of a stand-in for the model class, which imports that class when an attribute of it is needed."""

    def __getattr__(cls, name: str) -> object:
        from twotower.modeling_twotower import TwoTowerForCausalLM

        return getattr(TwoTowerForCausalLM, name)


def _add_model(models: ModuleType) -> None:
    """Adds the model class of `model_type` `two_tower`, so that the Auto classes need no code of the checkpoint."""
    from twotower.config import GenericTwoTowerConfig

    place = {"__module__": "twotower.modeling_twotower", "config_class": GenericTwoTowerConfig}
    model = _LateModel("TwoTowerForCausalLM", (), place)
    for auto in (models.AutoModel, models.AutoModelForCausalLM):
        auto.register(GenericTwoTowerConfig, model, exist_ok=True)


def _extend(factory: ModuleType) -> None:
    """Selects this package's class for `two_tower`, and wherever `architectures` names the two-tower model."""
    choose = getattr(factory, _CHOOSER, None)
    if choose is None:
        import warnings

        warnings.warn(
            "AutoModelForCausalLM does not recognise two-tower checkpoints with this version of transformers, and "
            "would leave their weights random; use twotower.TwoTowerForCausalLM.from_pretrained",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    if hasattr(choose, _MARK):
        return

    def choose_by_architecture(config: object, mapping: object) -> object:
        from twotower.config import ARCHITECTURE, GENERIC_ARCHITECTURE, GENERIC_MODEL_TYPE

        named = {ARCHITECTURE, GENERIC_ARCHITECTURE} & set(getattr(config, "architectures", None) or ())
        if not named and getattr(config, "model_type", None) != GENERIC_MODEL_TYPE:
            return choose(config, mapping)
        from twotower.modeling_twotower import TwoTowerForCausalLM

        return TwoTowerForCausalLM

    setattr(choose_by_architecture, _MARK, True)
    setattr(factory, _CHOOSER, choose_by_architecture)


_EXTENDERS: dict[str, Callable[[ModuleType], None]] = {
    _FACTORY: _extend,
    _CONFIGURATIONS: _add_configuration,
    _MODELS: _add_model,
}


class _FactoryHook:
    """An import finder: finds transformers' modules by the other finders, with a loader that extends the module."""

    def __init__(self) -> None:
        setattr(self, _MARK, True)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _EXTENDERS:
            return None
        for finder in sys.meta_path:
            find = None if hasattr(finder, _MARK) else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(name, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _ExtendingLoader(spec.loader)
                return spec
        return None


class _ExtendingLoader(Loader):
    """Wraps the loader of another finder, and extends the module after its execution."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> object:
        """Attributes of the wrapped loader, such as `get_source`, which `inspect` uses."""
        if name == "loader":  # not set yet, in a copy
            raise AttributeError(name)
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module = self.loader.create_module(spec)
        assert module is None or isinstance(module, ModuleType)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _EXTENDERS[module.__name__](module)
