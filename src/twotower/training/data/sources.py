"""Where documents come from: one `Source` for each `--data` item.

    PATH | HUB_ID  [:SPLIT] [@CONFIG] [=WEIGHT]

PATH is a file, a folder of files, or a folder that `save_to_disk` of `datasets` wrote. A file is .jsonl, .json (an
object a line), .ndjson, .txt (a document a line), each also as .gz, or .parquet. If a folder has files of several
splits, name the split: `folder:train`. Any other NAME or OWNER/NAME is a data set of the Hugging Face hub. WEIGHT
(default 1) is the relative share of *documents*, not of tokens, from this source. An item that exists as a path is
taken as the path.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from twotower.chat_template import ChatError, check_messages
from twotower.errors import ArgumentError, TwoTowerError
from twotower.training.data.documents import BadRecord, Record
from twotower.training.data.files import RawRecord
from twotower.training.data.keyed_random import fraction
from twotower.training.data.records import Records, Stream, open_records

Part = Literal["train", "valid"]
FINISH_FIELD, CUT_OFF = "finish_reason", "length"  # of a generated text that goes on after its last token

# Suffixes of an item, from the last to the first.
_WEIGHT = re.compile(r"(.+)=([+-]?[\d.]+(?:[eE][+-]?\d+)?)")
_CONFIG = re.compile(r"(.+)@([\w.-]+)")
_SPLIT = re.compile(r"([^:]+):([\w.\-\[\]:%+]+)")


@dataclass(frozen=True)
class Spec:
    """A parsed `--data` item; the grammar is in the module's docstring."""

    where: str
    split: str | None = None
    config: str | None = None
    weight: float = 1.0


def parse_spec(item: str) -> Spec:
    """Parses `PATH|HUB_ID[:SPLIT][@CONFIG][=WEIGHT]`.

    Raises:
        ArgumentError: an empty item, or a weight that is not above zero.
    """
    parts: dict[str, str] = {}
    where = item
    for name, pattern in (("weight", _WEIGHT), ("config", _CONFIG), ("split", _SPLIT)):
        if not Path(where).expanduser().exists() and (found := pattern.fullmatch(where)):
            where, parts[name] = found.groups()
    if not where.strip():
        raise ArgumentError(f"data {item!r}: no path or hub id; give PATH or HUB_ID, then [:SPLIT][@CONFIG][=WEIGHT]")
    try:
        weight = float(parts.get("weight", 1.0))
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ArgumentError(f"data {item!r}: the weight is {parts['weight']}; give a number above 0")
    return Spec(where, parts.get("split"), parts.get("config"), weight)


class Source:
    """One source of records. Parses records, counts bad records, and separates training from held-out records.

    Args:
        data: an item of the grammar above, or a `datasets.Dataset` or `IterableDataset`.
        part: "train": the records that are not held out; "valid": the held-out records.
        held_out_fraction: the share that is held out, by a hash of a record's text: independent of the order and of
            other records; equal texts stay together. A separate validation source has part "train" and fraction 0.
        weight: overrides the weight of the item.
        streaming: read in the order of the source, without loading or indexing the source first.
        text_field, prompt_field: fields of a record's text and of its prompt (None: records have no prompts).
        messages_field: field of a conversation, for records without a text (None: there are no conversations).
        max_bad_records: so many different bad records are skipped in one process; one more is an error.
        cache_dir: where `datasets` stores converted data. Default: for local files a folder in the system's temporary
            folder, for the hub the cache of `datasets`.

    Raises:
        ArgumentError: no such file, data set, split or field; names the existing ones.
    """

    def __init__(
        self,
        data: object,
        *,
        part: Part = "train",
        held_out_fraction: float = 0.0,
        weight: float | None = None,
        streaming: bool = False,
        text_field: str = "text",
        prompt_field: str | None = "prompt",
        messages_field: str | None = "messages",
        max_bad_records: int = 100,
        cache_dir: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        if not 0.0 <= held_out_fraction < 1.0:
            raise ArgumentError(f"held_out_fraction is {held_out_fraction}; give a number from 0 up to 1, like 0.01")
        if part not in ("train", "valid"):
            raise ArgumentError(f"part is {part!r}; give 'train' or 'valid'")
        spec = parse_spec(str(data)) if isinstance(data, str | Path) else Spec(type(data).__name__)
        self.name = name or (str(data) if isinstance(data, str | Path) else spec.where)
        self.weight = spec.weight if weight is None else weight
        if not 0 < self.weight < math.inf:
            raise ArgumentError(f"{self.name}: the weight is {weight}; give a number above 0")
        self.part, self.held_out_fraction = part, held_out_fraction
        self.text_field, self.prompt_field, self.messages_field = text_field, prompt_field, messages_field
        self.max_bad_records = max_bad_records
        self.bad: dict[str, str] = {}  # place → reason, in the order met
        self.has_good = False  # whether a record of either part is usable
        fields = [text_field, messages_field or text_field, prompt_field or text_field, FINISH_FIELD]
        self.records: Records | Stream = open_records(
            spec.where if isinstance(data, str | Path) else data,
            name=self.name,
            split=spec.split,
            config=spec.config,
            streaming=streaming,
            fields=fields,
            cache_dir=cache_dir,
        )

    def parse(self, raw: RawRecord) -> Record | None:
        """The parsed record; None if the record is blank, bad, or of the other part.

        Raises:
            TwoTowerError: more than max_bad_records bad records; names the last.
        """
        try:
            record = self._record(raw)
        except BadRecord as bad:
            self.reject(raw.place, str(bad))
            return None
        self.has_good |= record is not None
        return record if record is not None and self._wanted(record) else None

    def reject(self, place: str, reason: str) -> None:
        """Counts a bad record, each record once."""
        if place in self.bad:
            return
        self.bad[place] = reason
        if len(self.bad) > self.max_bad_records:
            raise TwoTowerError(
                f"{self.name}: {len(self.bad)} bad records, {self.max_bad_records} are allowed; the last is {place}: "
                f"{reason}; correct the data or raise max_bad_records"
            )

    def first_bad(self) -> str:
        """Words on bad records, with the first of them, for the end of an error; none without bad records."""
        if not self.bad:
            return ""
        place, reason = next(iter(self.bad.items()))
        count = f"{len(self.bad)} bad record" + "s" * (len(self.bad) > 1)
        return f"; {count}, the first is {place}: {reason}"

    def _record(self, raw: RawRecord) -> Record | None:
        content = raw.content
        if isinstance(content, bytes):
            if not content.strip():
                return None  # a blank line is not a record
            try:
                line = content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise BadRecord(f"not UTF-8 ({error.reason} at byte {error.start})") from None
            if raw.plain:
                return Record(line.rstrip("\r\n"), None, raw.place)
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadRecord(f"broken JSON ({error})") from None
        if not isinstance(content, dict):
            raise BadRecord(f"a JSON {type(content).__name__}, not an object")
        ends = content.get(FINISH_FIELD) != CUT_OFF
        if content.get(self.text_field) is None and content.get(self.messages_field or "") is not None:
            try:
                return Record("", None, raw.place, check_messages(content[self.messages_field or ""]), ends)
            except ChatError as error:
                raise BadRecord(str(error)) from None
        if self.text_field not in content:
            raise BadRecord(f"no field {self.text_field!r} (it has {_some(list(content))})")
        text = self._string(content, self.text_field)
        if not text.strip():
            raise BadRecord(f"field {self.text_field!r} is empty")
        prompt = None
        if self.prompt_field is not None and content.get(self.prompt_field) is not None:
            prompt = self._string(content, self.prompt_field)
        return Record(text, prompt, raw.place, ends=ends)

    def _string(self, content: dict[str, object], field: str) -> str:
        value = content[field]
        if not isinstance(value, str):
            raise BadRecord(f"field {field!r} is {'null' if value is None else f'a {type(value).__name__}'}, not text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRecord(f"field {field!r} holds half a surrogate pair") from None
        return value

    def _wanted(self, record: Record) -> bool:
        if self.held_out_fraction == 0.0:
            return self.part == "train"
        held_out = fraction(record.content.encode(errors="surrogatepass")) < self.held_out_fraction
        return held_out == (self.part == "valid")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "none"
