"""Prompt protocol of DeepSeek-V4: rendering, tokenisation, output parsing. No device code."""

from pelagos.chat.bpe import train_tokenizer

__all__ = ["train_tokenizer"]
