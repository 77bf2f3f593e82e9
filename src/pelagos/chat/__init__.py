"""Prompt protocol of DeepSeek-V4: rendering, tokenisation, output parsing. No device code."""

from pelagos.chat.bpe import train_tokenizer
from pelagos.chat.parser import Event, Parser
from pelagos.chat.render import Prompt, render, render_prompt
from pelagos.chat.tokenizer import StreamDecoder, Tokenizer

__all__ = ["Event", "Parser", "Prompt", "StreamDecoder", "Tokenizer", "render", "render_prompt", "train_tokenizer"]
