"""vLLM's reader of config.json, extended to two-tower checkpoints."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig
from vllm.transformers_utils.config import HFConfigParser

from twotower.errors import TwoTowerError
from twotower.json_text import JsonObject
from twotower_vllm.backbone_config import backbone_of, is_two_tower
from twotower_vllm.exits import refuse


class ConfigParser(HFConfigParser):
    """Gives vLLM the configuration of the backbone. Code of the checkpoint is not run, whatever `--trust-remote-code`.

    Other checkpoints are read by vLLM's own class.
    """

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: object,
    ) -> tuple[JsonObject, PretrainedConfig]:
        """The keys of config.json, and the configuration. Ends the process with one line if it is not supported."""
        hub = {name: kwargs[name] for name in ("token", "local_files_only") if name in kwargs}
        raw, _ = PretrainedConfig.get_config_dict(model, revision=revision, **hub)
        if not is_two_tower(raw):
            read: tuple[JsonObject, PretrainedConfig] = super().parse(
                model, trust_remote_code, revision, code_revision, **kwargs
            )
            return read
        try:
            config = backbone_of(raw)
        except TwoTowerError as error:
            refuse(f"{model}: {error}")
        config._name_or_path = str(model)
        return raw, config
