"""Names of the special tokens of DeepSeek-V4: the one place where they are spelled.

Ids are never written down: they are read from `tokenizer.json`. A new small vocabulary (`train_tokenizer`) gives
them the ids 0, 1, 2 ... in the order of SPECIAL_TOKENS. Source: the released tokenizer.
"""

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"
# Value of a message's `task` field -> the token that asks for it (quick instructions).
TASK_TOKENS = {
    task: f"<｜{task}｜>" for task in ("action", "query", "authority", "domain", "title", "extracted_url", "read_url")
}
SPECIAL_TOKENS: tuple[str, ...] = (
    *(BOS, EOS, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, THINK, END_THINK, DSML, LATEST_REMINDER),
    *TASK_TOKENS.values(),
)
# Inside this room one unpaired surrogate stands for one special token: text that came in as UTF-8 cannot hold any.
MARKS = {token: chr(0xD800 + index) for index, token in enumerate(SPECIAL_TOKENS)}
