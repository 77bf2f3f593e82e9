"""Names of the special tokens of DeepSeek-V4: the one place where they are spelled.

Ids are never written down here: they are read from `tokenizer.json`. A new small vocabulary (`train_tokenizer`)
gives them the ids 0, 1, 2 ... in the order of SPECIAL_TOKENS. Source: the released tokenizer.
"""

from __future__ import annotations

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"

# Value of a message's `task` field -> the token that asks for it (quick instructions).
TASK_TOKENS = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "extracted_url": "<｜extracted_url｜>",
    "read_url": "<｜read_url｜>",
}

SPECIAL_TOKENS: tuple[str, ...] = (
    BOS,
    EOS,
    FIM_HOLE,
    FIM_BEGIN,
    FIM_END,
    USER,
    ASSISTANT,
    THINK,
    END_THINK,
    DSML,
    LATEST_REMINDER,
    *TASK_TOKENS.values(),
)
