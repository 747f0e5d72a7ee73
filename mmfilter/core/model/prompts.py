"""Where a caption ends up among the model's tokens.

Processors edit a prompt themselves (BOS, 576 placeholders for one image, newlines, separators), and
tokenising the prefix alone does not give a prefix of the tokens of the whole. So the tokenizer is
listened to while the processor calls it: its final text and character offsets say exactly which tokens
are the caption's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mmfilter.errors import ModelError

CAPTION = "{caption}"
SENTINEL = "\ue000\ue001\ue000"
"""Private-use characters: never a placeholder and never merged with their neighbours."""


def default_prompt(processor: Any, image_token: str) -> str:
    """The model's own chat template around one image and a caption, else image, newline, caption."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": SENTINEL}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        bos = getattr(processor.tokenizer, "bos_token", None)
        if bos and text.startswith(bos):  # the tokenizer adds it again
            text = text[len(bos) :]
        return text.replace(SENTINEL, CAPTION)
    return f"{image_token}\n{CAPTION}"


class CaptionEscaper:
    """Breaks strings in captions that the tokenizer would read as control tokens (`<image>`, `</s>`)."""

    def __init__(self, tokenizer: Any) -> None:
        special = {str(token) for token in tokenizer.get_added_vocab()} | set(tokenizer.all_special_tokens)
        self._special = sorted((token for token in special if len(token) > 1), key=len, reverse=True)

    def __call__(self, caption: str) -> str:
        for token in self._special:
            if token in caption:
                caption = caption.replace(token, f"{token[0]} {token[1:]}")
        return caption


@contextmanager
def listening(processor: Any) -> Iterator[list[tuple[list[str], Any]]]:
    """Record (texts, encoding) of every tokenizer call that `processor` makes in the block.

    Swaps the tokenizer's class, so the processor must belong to this thread alone.
    """
    tokenizer = processor.tokenizer
    original = tokenizer.__class__
    heard: list[tuple[list[str], Any]] = []

    def call(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        encoding = original.__call__(self, text, *args, **kwargs)
        heard.append(([text] if isinstance(text, str) else list(text or []), encoding))
        return encoding

    tokenizer.__class__ = type(original.__name__, (original,), {"__call__": call})
    try:
        yield heard
    finally:
        tokenizer.__class__ = original


def heard_with(heard: list[tuple[list[str], Any]], part: str) -> tuple[list[str], Any]:
    """The call among `heard` whose first text holds `part`: processors tokenise other things too."""
    for texts, encoding in reversed(heard):
        if texts and part in texts[0]:
            return texts, encoding
    raise ModelError(
        f"the processor never tokenised the prompt as it is (looked for {part[:40]!r}): its caption cannot be told "
        "from its template"
    )


def caption_mask(
    texts: list[str], encoding: Any, captions: list[str], suffix: str, input_ids: torch.Tensor
) -> torch.Tensor:
    """(batch, length) bool: the tokens that overlap each caption's characters.

    `texts` and `encoding` come from `listening`; `suffix` is what the finished text has behind the
    caption. Raises `ModelError` when a processor changed the caption or the tokens themselves.
    """
    mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    for i, (text, caption) in enumerate(zip(texts, captions, strict=True)):
        end = len(text) - len(suffix)
        start = end - len(caption)
        if text[start:end] != caption:
            raise ModelError(
                f"the processor rewrote the caption {caption[:40]!r} to {text[start:end][:40]!r}: its tokens cannot be "
                "told apart"
            )
        row = encoding.encodings[i]
        inside = [
            a < end and b > start and not s for (a, b), s in zip(row.offsets, row.special_tokens_mask, strict=True)
        ]
        ahead = input_ids.shape[1] - len(inside)  # some processors put image tokens in front afterwards
        if ahead < 0 or input_ids[i, ahead:].tolist() != row.ids:
            raise ModelError("the processor changed the tokens after tokenising: the caption's cannot be told apart")
        mask[i, ahead:] = torch.tensor(inside)
    return mask
