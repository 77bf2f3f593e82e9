"""Question and answer pairs made from the corpus: tldr commands, PEPs, Python docstrings, and some small talk.

Every answer is text of the document it comes from in a fixed frame; thinking is a short template that says no more than
the answer knows. A document always gives the same pairs. Pairs become conversations of 1 to 4 turns with thinking off
or on (at each effort). Only the standard library.
"""

import ast
import random
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pelagos.train.sources import Document


@dataclass(frozen=True, slots=True)
class Pair:
    """One question with its answer and the thinking that leads there."""

    question: str
    answer: str
    thinking: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat-completions body that ends with the user's turn, and the reply; `thinking` is None when it is off."""

    body: dict[str, Any]
    thinking: str | None
    answer: str


SYSTEM = "You are a helpful assistant."
# (thinking on, effort, share): the effort decides the prefix of the prompt, so every one of them is trained.
MODES = ((False, None, 0.5), (True, "low", 0.2), (True, "high", 0.2), (True, "max", 0.1))
PYTHON_PAIRS_PER_DOCUMENT = 3
_HOW = (
    "How do I {do} with {tool}?", "How can I {do} using `{tool}`?", "What is the `{tool}` command to {do}?",
    "Give me the {tool} command to {do}.", "I want to {do}. Which {tool} command do I need?",
    "Using {tool}, how would I {do}?", "Show me how to {do} with `{tool}`.", "{tool}: {do}",
    "How do I {do}?", "Which command can {do}?",
)  # fmt: skip
_ANSWER = (
    "Run `{command}`. {summary}", "Use `{command}` to {do}.", "To {do}, run:\n\n`{command}`",
    "You can {do} with `{command}`.", "`{command}`\n\n{summary}", "Run:\n\n`{command}`\n\n{summary}",
)  # fmt: skip
_WHAT_TOOL = (
    "What does the command `{tool}` do?", "What is {tool}?", "What is `{tool}` for?", "Explain the {tool} command.",
    "Tell me about {tool}.",
)  # fmt: skip
_WHAT_PEP = ("What is PEP {n}?", "Tell me about PEP {n}.", "What is PEP {n} about?", "Summarize PEP {n}.")
_WHAT_NAME = ("What does `{name}` do?", "What is `{name}` for?", "Explain `{name}`.", "What does {name} do in Python?")
_WRITE = (
    "Write a Python function `{head}`: {doc}", "Implement `{head}` in Python. {doc}",
    "Write `{head}`. Its docstring is: {doc}",
)  # fmt: skip
_DOCSTRING = ("Write a docstring for this function:", "What does this function do?", "Document this Python function:")
_ABOUT = (
    "I am nano, a small language model with the DeepSeek-V4 architecture. I was trained by Pelagos on Python code, "
    "command-line pages, PEPs, Rust guides and a few old novels."
)
_SKILLS = (
    "I can name commands for common tools, say what a PEP is about, and write short Python. I am small, so check me."
)
_LIMITS = "I am a small model with about 28 million parameters, so I am often wrong. Please check what I say."
_NO_LIVE = "I cannot know that: I have no clock and no network, only the text I was trained on."
# Questions divided by |, answers divided by |: each question is asked with each answer.
_SMALL_TALK = (
    ("Hello|Hi|Hey|Hello!|Hi there|Hey there!|Good morning", "Hello! How can I help you?|Hi! What can I do for you?"),
    ("Hello, how are you?|How are you?|How are you doing?|What's up?", "I am well, thank you. How can I help you?"),
    ("Who are you?|What are you?|Introduce yourself.|Tell me about yourself.|What is your name?", _ABOUT),
    ("Are you ChatGPT?|Are you DeepSeek?|Are you an AI?|Are you human?|Which model are you?|Who is nano?", _ABOUT),
    ("What can you do?|How can you help me?|Help|What do you know?|What should I ask you?", _SKILLS),
    ("How big are you?|Are you smart?|How many parameters do you have?|Can I trust you?|Do you make errors?", _LIMITS),
    ("What is the weather like?|What time is it?|What day is it today?|What is the news?", _NO_LIVE),
    ("Thanks|Thank you!|Thanks a lot|Many thanks.|Great, thanks", "You are welcome!|You are welcome. What else?"),
    ("Bye|Goodbye!|See you|Good night|See you later", "Goodbye!|Goodbye, and good luck!"),
    ("Okay|OK|Great|Nice|Cool|Good", "Good. What would you like to know next?"),
    ("Who made you?|Who trained you?|Where do you come from?", "Pelagos trained me with its own commands."),
    ("What is Pelagos?|Tell me about Pelagos.", "Pelagos is DeepSeek-V4 in Python: model, training and serving."),
    ("What is Python?|What is the Python language?", "Python is a language with a rich standard library."),
    ("What is Rust?|What is the Rust language?", "Rust is a systems language with memory safety."),
    ("Say hello.|Say hi.|Greet me.", "Hello!"),
    ("Tell me a joke.|Make me laugh.", "Why do coders mix up Halloween and Christmas? Oct 31 equals Dec 25."),
)  # fmt: skip


def pairs_of(document: Document) -> list[Pair]:
    """Return the pairs a document gives; none for most kinds of document. Raises nothing on odd text."""
    rng = random.Random(document.source)
    if document.source.startswith("tldr/"):
        return _tldr_pairs(document.text, rng)
    if re.fullmatch(r"peps/peps/pep-\d+\.\w+", document.source):
        return _pep_pairs(document.text, rng)
    return _python_pairs(document, rng) if document.kind == "code" else []


def small_talk() -> list[Pair]:
    """Return greetings and questions about the model itself, with honest answers."""
    return [
        Pair(question, answer, f"This is small talk: {question!r}. I answer briefly and honestly.")
        for questions, answers in _SMALL_TALK
        for question in questions.split("|")
        for answer in answers.split("|")
    ]


def conversations(groups: Iterable[list[Pair]], rng: random.Random) -> list[Conversation]:
    """Make conversations of 1 to 4 turns; a group holds the pairs of one document, some of which stay together."""
    talks, loose = list[list[Pair]](), list[Pair]()
    for group in groups:
        group = rng.sample(group, len(group))
        turns = rng.randint(2, 4) if len(group) > 2 and rng.random() < 0.3 else 0
        if turns:
            talks.append(group[:turns])
        loose += group[turns:]
    rng.shuffle(loose)
    while loose:
        turns = rng.choices((1, 2, 3, 4), (0.75, 0.13, 0.08, 0.04))[0]
        talks.append(loose[:turns])
        del loose[:turns]
    rng.shuffle(talks)
    return [_conversation(talk, rng) for talk in talks]


def _conversation(talk: list[Pair], rng: random.Random) -> Conversation:
    thinks, effort, _ = rng.choices(MODES, [mode[2] for mode in MODES])[0]
    messages = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.3 else []
    for pair in talk[:-1]:
        messages += [{"role": "user", "content": pair.question}, {"role": "assistant", "content": pair.answer}]
    messages.append({"role": "user", "content": talk[-1].question})
    body: dict[str, Any] = {"messages": messages, "thinking": {"type": "enabled" if thinks else "disabled"}}
    if effort:
        body["reasoning_effort"] = effort
    return Conversation(body, talk[-1].thinking if thinks else None, talk[-1].answer)


def _tldr_pairs(text: str, rng: random.Random) -> list[Pair]:
    title = re.match(r"# (.+)\n", text)
    if not title or "`" in title[1]:
        return []
    tool = title[1].strip()
    lines = re.findall(r"^> (?!More information|See also|Note|Homepage)(.*)$", text, re.MULTILINE)
    summary = re.sub(r"\s*<?https?://\S+", "", " ".join(lines)).strip()
    if not summary or "alias of" in summary:
        return []
    first = re.split(r"(?<=[.!?])\s", summary)[0]
    think = f"The user asks what {tool} is. I recall: {first} I answer with that."
    pairs = [Pair(rng.choice(_WHAT_TOOL).format(tool=tool), f"`{tool}`: {summary}", think)]
    for description, command in re.findall(r"^- (.+):\n\n`([^`\n]+)`$", text, re.MULTILINE):
        command = re.sub(r"\{\{(.*?)\}\}(?!\})", lambda match: _placeholder(match[1]), command)
        description = re.sub(r"\[(\w+)\]", r"\1", description)
        if re.match(r"Display (help|version)", description) and rng.random() < 0.8:
            continue
        if "`" in description or "{{" in command or not re.match(r"[A-Z][a-z]+ ", description):
            continue
        do = description[0].lower() + description[1:]
        words = {"do": do, "tool": tool, "command": command, "summary": first}
        how = rng.choices(_HOW, [1.0] * (len(_HOW) - 2) + [0.25] * 2)[0]
        think = rng.choice((
            f"The user wants to {do}. The tool is {tool}: {first} The command is `{command}`.",
            f"The question is about {tool}. To {do}, the command is `{command}`.",
        ))  # fmt: skip
        pairs.append(Pair(how.format(**words), rng.choice(_ANSWER).format(**words), think))
    return pairs


def _placeholder(inner: str) -> str:
    """Show an option choice `[-l|--long]` by its last spelling and a plain placeholder by its text."""
    options = re.fullmatch(r"\[(.+)\]", inner)
    return options[1].split("|")[-1] if options else inner


def _pep_pairs(text: str, rng: random.Random) -> list[Pair]:
    head, _, rest = text.partition("\n\n")
    fields = dict(re.findall(r"^([A-Z][\w-]+): +(.+)$", head, re.MULTILINE))
    if not {"PEP", "Title", "Status", "Type", "Created"} <= set(fields):
        return []
    n, title, status = fields["PEP"], fields["Title"].strip(), fields["Status"]
    pairs = []
    body = re.search(r"\n[A-Z][\w ]+\n[=-]{3,}\n+((?:\S.*\n)+)", "\n" + rest)
    if body:
        plain = re.sub(r":[\w-]+:`([^`<]+?)\s*(?:<[^`]*>)?`", r"\1", " ".join(body[1].split()))
        plain = re.sub(r"`([^`<]+?)\s*<[^`]*>`_+", r"\1", plain).replace("``", "`")
        sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", re.sub(r"\s*\[[\w#]+\]_", "", plain))
        about = sentences[0] if len(sentences) < 2 or len(sentences[0]) > 160 else " ".join(sentences[:2])
        if len(about) < 400 and about[-1] in ".!?" and not re.match(r"\W", about):
            answer = f'PEP {n} is "{title}". {about}'
            think = f'PEP {n} has the title "{title}". I recall how its text begins.'
            pairs.append(Pair(rng.choice(_WHAT_PEP).format(n=n), answer, think))
    for question, answer in (
        (f"What is the title of PEP {n}?", f'The title of PEP {n} is "{title}".'),
        (f"What is the status of PEP {n}?", f'PEP {n} ("{title}") has the status {status}.'),
        (f"When was PEP {n} created?", f'PEP {n} ("{title}") was created on {fields["Created"]}.'),
        (f'Which PEP is "{title}"?', f'"{title}" is PEP {n}.'),
    ):
        pairs.append(Pair(question, answer, f"This asks about a header of PEP {n}, {title}. I recall it."))
    return pairs


def _python_pairs(document: Document, rng: random.Random) -> list[Pair]:
    path = re.sub(r"(/__init__)?\.py$", "", document.source).removeprefix("python-stdlib/").split("/")
    if any(part.startswith(("_", "test")) or part == "tests" for part in path):
        return []
    try:
        with warnings.catch_warnings(action="ignore"):  # escapes that a later Python will refuse
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    module = ".".join(path[1:] if len(path) > 1 and path[0].lower() == path[1].lower() else path)
    pairs = []
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        doc = (ast.get_docstring(node) or "").split("\n\n")[0]
        doc = " ".join(doc.split())
        if not 20 <= len(doc) <= 220 or doc[-1] != "." or not doc.isascii() or re.search(r"`|>>>|::|\.\. ", doc):
            continue
        name = f"{module}.{node.name}"
        think = f"`{name}` is in the module {module}. Its docstring tells what it does."
        pairs.append(Pair(rng.choice(_WHAT_NAME).format(name=name), f"`{name}`: {doc}", think))
        if isinstance(node, ast.FunctionDef) and not node.decorator_list and len(node.body) > 1:
            pairs += _function_pairs(document.text, node, doc, rng)
    return rng.sample(pairs, min(len(pairs), PYTHON_PAIRS_PER_DOCUMENT))


def _function_pairs(text: str, node: ast.FunctionDef, doc: str, rng: random.Random) -> list[Pair]:
    lines = text.split("\n")
    start, end = node.body[1].lineno - 1, node.end_lineno or 0
    if not 1 <= end - start <= 10 or "\f" in text:
        return []
    head = f"{node.name}({ast.unparse(node.args)})"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    body = "\n".join(lines[start:end])
    code = f"```python\ndef {head}{returns}:\n{body}\n```"
    write = rng.choice(_WRITE).format(head=head, doc=doc)
    return [
        Pair(write, code, f"The user wants a function named `{node.name}`. It should do this: {doc}"),
        Pair(f"{rng.choice(_DOCSTRING)}\n\n{code}", doc, f"The function is `{node.name}`. I say what it does."),
    ]
