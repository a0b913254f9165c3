"""Records the denoising passes of a run, and shows them on a terminal.

`Watcher` has the step callback. It makes a `Frame` of each pass and gives the frame to a view. A frame is one pass
late: the callback gets a block before the commits of its pass, so these commits are visible in the next call.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.text import Text

from twotower.cli.colours import colour, on
from twotower.cli.terminal import can_move_cursor

if TYPE_CHECKING:
    from torch import Tensor

    from twotower.decoding.block_rule import BlockRule
    from twotower.decoding.output import BlockEvent
    from twotower.engine.denoiser_step import StepCallback
    from twotower.tokenizer import Tokenizer

FRAME_SECONDS = 0.09  # the shortest time of a frame on a terminal, so that it can be seen
MASK = " ░░"
MASK_PLAIN = "░"


@dataclass(frozen=True)
class Frame:
    """A block after `passes` passes; with 0 passes, all positions are masked, or drafted by the pass before (adapters).

    tokens: None for a masked position; the last frame of a block has only tokens of the text. fresh: committed by the
    last pass. confidence: at the commit, or of the best candidate so far; None before the first pass. total_passes,
    total_tokens: of the run so far. verified: whether the context tower has read the block. Then the last token is the
    context tower's own.
    """

    block: int
    size: int
    passes: int
    tokens: list[int | None]
    fresh: list[bool]
    confidence: list[float | None]
    total_passes: int
    total_tokens: int
    verified: bool = False

    @property
    def t(self) -> float:
        """The masked fraction of the block."""
        return sum(token is None for token in self.tokens) / self.size

    @property
    def tokens_per_pass(self) -> float:
        return self.total_tokens / self.total_passes if self.total_passes else 0.0


class TokenNames:
    """Tokens as visible text: special tokens by name, newlines as ↵, parts of a character as ·."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_ids)

    def __call__(self, token: int) -> str:
        if token in self.special:
            return str(self.tokenizer.convert_ids_to_tokens(token))
        return visible(str(self.tokenizer.decode([token]))) or "·"


def visible(text: str, keep: str = "") -> str:
    """Text that is safe for a terminal: newlines and tabs as symbols, other control characters as ·."""
    signs = {"\n": "↵", "\t": "⇥", "\ufffd": "·"}
    return "".join(c if c in keep else signs.get(c, c if c.isprintable() else "·") for c in text)


# --- recording ------------------------------------------------------------------------------------------------------


class View(Protocol):
    """Shows frames. owns_stdout: nothing may be written to stdout while the view is open."""

    owns_stdout: bool

    def open(self, names: TokenNames) -> None: ...
    def frame(self, frame: Frame) -> None: ...
    def append_text(self, text: str) -> None: ...
    def close(self, interrupted: bool) -> None: ...


class Watcher:
    """Records row 0 of a run: pass `on_pass` as step callback, and iterate over `watch(events)`.

    mode, rule: of the run; None: as released.
    """

    def __init__(
        self, tokenizer: Tokenizer, mask_token: int, view: View, mode: str = "diffusion", rule: BlockRule | None = None
    ) -> None:
        from twotower.decoding.block_rule import RELEASED

        rule = RELEASED if rule is None else rule
        self.names = TokenNames(tokenizer)
        self.mask_token = mask_token
        self.view = view
        # Leading positions of every block that are text already, and outputs before those that predict the others.
        self.known_positions = int(mode == "verified" if rule.one_pass else rule.begins_with_text(mode))
        self.unused_outputs = self.known_positions - rule.shift
        # There are no calls of `on_pass` with one pass a round; the events alone show the drafts.
        self.one_pass = rule.one_pass
        self.keeps_drafts = mode == "diffusion" and self.known_positions > 0 and not rule.one_pass
        self.blocks: list[list[Frame]] = []
        self._block_open = False  # whether the event of the last block is still to come
        self._logits: Tensor | None = None  # of the last pass, whose commits come with the next call
        self._drawing_seconds = 0.0
        self._passes = self._tokens = 0  # of the earlier blocks

    def __enter__(self) -> Watcher:
        self.view.open(self.names)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.view.close(interrupted=kind is not None)

    @property
    def callback(self) -> StepCallback | None:
        """The step callback of the run."""
        return None if self.one_pass else self.on_pass

    def on_pass(self, step: int, steps: int, block: Tensor, *, t: float, logits: Tensor | None, block_idx: int) -> None:
        """The `step_callback` of the published API."""
        started = time.perf_counter()
        row = block[0, self.known_positions :]
        if logits is None:
            self._open_block()
        if logits is None or step > 0:
            tokens = [None if token == self.mask_token else token for token in row.tolist()]
            self._add_frame(block_idx, len(tokens), tokens, self._confidence(tokens))
        self._logits = None if logits is None else logits[0, self.unused_outputs :][: len(row)].clone()
        self._drawing_seconds += time.perf_counter() - started

    def watch(self, events: Iterator[BlockEvent]) -> Iterator[BlockEvent]:
        """Yields the events; the result's time excludes the time for drawing."""
        for event in events:
            if event.result is not None:
                seconds = event.result.decode_seconds - self._drawing_seconds
                event = replace(event, result=replace(event.result, decode_seconds=seconds))
            started = time.perf_counter()
            self._close_block(event)
            self._drawing_seconds += time.perf_counter() - started
            yield event

    def _open_block(self) -> None:
        self.blocks.append([])
        self._logits, self._block_open = None, True

    def _close_block(self, event: BlockEvent) -> None:
        alone = not self._block_open
        if alone:  # a token of the context tower, without a draft
            self._open_block()
            given = event.draft if self.one_pass and event.draft else [None] * len(event.tokens)
            self._add_frame(event.block, len(event.tokens), given, [None] * len(given))
        frames = self.blocks[-1]
        whole = len(event.tokens) > frames[0].size  # the context tower's token follows the block
        draft = event.tokens[:-1] if self.keeps_drafts and whole else event.draft
        if draft and not self.one_pass:
            self._add_frame(event.block, len(draft), draft, self._confidence(draft))
        verified = bool(self.known_positions) and (alone or whole or not self.keeps_drafts)
        self._add_frame(event.block, frames[0].size, event.tokens, event.confidence, verified)
        self._passes, self._tokens = frames[-1].total_passes, frames[-1].total_tokens
        self._block_open = False
        self.view.append_text(event.text)

    def _add_frame(
        self,
        block: int,
        size: int,
        tokens: Sequence[int | None],
        confidence: Sequence[float | None],
        verified: bool = False,
    ) -> None:
        frames = self.blocks[-1]
        nothing = [None] * len(tokens)
        before = [*frames[-1].tokens, *nothing] if frames else nothing
        old_confidence = [*frames[-1].confidence, *nothing] if frames else nothing
        frame = Frame(
            block=block,
            size=size,
            passes=len(frames),
            tokens=list(tokens),
            fresh=[token is not None and before[i] != token for i, token in enumerate(tokens)],
            # A committed token keeps the confidence of its commit.
            confidence=[
                probability if before[i] is None or before[i] != tokens[i] else old_confidence[i]
                for i, probability in enumerate(confidence)
            ],
            total_passes=self._passes + len(frames),
            total_tokens=self._tokens + sum(token is not None for token in tokens),
            verified=verified,
        )
        frames.append(frame)
        self.view.frame(frame)

    def _confidence(self, tokens: Sequence[int | None]) -> list[float | None]:
        """Confidence in the last pass of each committed token, or of the most likely token of a masked position."""
        from twotower.decoding.sampling import confidence

        if self._logits is None:
            return [None] * len(tokens)
        logits = self._logits[: len(tokens)]
        logits[:, self.mask_token] = float("-inf")
        best = logits.argmax(-1)
        chosen = best.new_tensor([self.mask_token if token is None else token for token in tokens])
        scored = chosen.where(chosen != self.mask_token, best)
        return [float(probability) for probability in confidence(logits[None], scored[None])[0].tolist()]


# --- views ----------------------------------------------------------------------------------------------------------


def block_text(frame: Frame, names: TokenNames) -> Text:
    """The text of a block: ░ for masked positions; tokens of the last pass in the colour of their confidence."""
    out = Text()
    for i, token in enumerate(frame.tokens):
        if token is None:
            out.append(MASK, Style(dim=True))
        else:
            style = on(colour(frame.confidence[i] or 0.0)) if frame.fresh[i] else Style()
            out.append(names(token), style)
            if names(token).endswith("↵"):
                out.append("\n")
    return out


class NullView:
    """Shows nothing; for runs that are only recorded."""

    owns_stdout = False

    def open(self, names: TokenNames) -> None: ...
    def frame(self, frame: Frame) -> None: ...
    def append_text(self, text: str) -> None: ...
    def close(self, interrupted: bool) -> None: ...


class LineView:
    """Prints one line per pass, for logs and pipes."""

    owns_stdout = False

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def open(self, names: TokenNames) -> None:
        self.names = names

    def frame(self, frame: Frame) -> None:
        text = "".join(MASK_PLAIN if token is None else self.names(token) for token in frame.tokens)
        drafted = not frame.passes and any(token is not None for token in frame.tokens)
        name = "check  " if frame.verified else "draft  " if drafted else f"pass {frame.passes:>2}"
        self.stream.write(f"block {frame.block + 1:>2}  {name}  t {frame.t:4.2f}  {text}\n")
        self.stream.flush()

    def append_text(self, text: str) -> None: ...
    def close(self, interrupted: bool) -> None: ...


class LiveView:
    """Shows the text so far and the current block, redrawn in place on a terminal."""

    def __init__(self, console: Console, prompt: str, keep: bool) -> None:
        """keep: leave the final text on the terminal."""
        self.console = console
        self.prompt = prompt
        self.keep = keep
        self.owns_stdout = sys.stdout.isatty()
        self.text = ""
        self._last = 0.0

    def open(self, names: TokenNames) -> None:
        self.names = names
        self.live = Live(console=self.console, auto_refresh=False, transient=not self.keep)
        self.live.start()

    def frame(self, frame: Frame) -> None:
        name = "check" if frame.verified else f"pass {frame.passes}"
        status = f"block {frame.block + 1} · {name} · t {frame.t:.2f}"
        status += f" · {frame.tokens_per_pass:.1f} tokens/pass"
        self._show(block_text(frame, self.names), Text(status, Style(dim=True)))

    def append_text(self, text: str) -> None:
        self.text += text

    def close(self, interrupted: bool) -> None:
        if self.keep or interrupted:  # after Ctrl-C, the final text stays readable
            self.live.transient = False
            self._show(Text(), None)
        self.live.stop()

    def _show(self, block: Text, status: Text | None) -> None:
        wait = FRAME_SECONDS - (time.perf_counter() - self._last)
        if wait > 0 and status is not None:
            time.sleep(wait)
        room, width = max(self.console.height - 4, 3), self.console.width
        text = visible(self.text[-room * width :], keep="\n")  # more does not fit, and wrapping it would take time
        prompt = visible(self.prompt[-room * width :], keep="\n") if len(self.text) < room * width else ""
        lines = list(Text.assemble((prompt, Style(dim=True)), text, block).wrap(self.console, width))[-room:]
        shown = Text("\n").join(lines)
        self.live.update(Group(shown) if status is None else Group(shown, Text(), status), refresh=True)
        self._last = time.perf_counter()


def make_view(stream: str, prompt: str, keep: bool) -> View:
    """A view for "stdout" or "stderr": live on a terminal, else one line per pass."""
    if can_move_cursor(getattr(sys, stream)):
        return LiveView(Console(stderr=stream == "stderr", highlight=False), prompt, keep)
    return LineView(getattr(sys, stream))
