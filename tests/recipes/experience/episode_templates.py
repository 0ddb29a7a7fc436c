"""The templates that episodes are tried with: those of tests/data, and all that the installed TRL ships."""

import copy
import re
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken

OURS = sorted((Path(__file__).parents[2] / "data" / "templates").glob("*.jinja"))
_TRL = find_spec("trl")
THEIRS = sorted((Path(_TRL.origin).parent / "chat_templates").glob("*.jinja")) if _TRL and _TRL.origin else []
NO_TEXT = ("idefics3", "smolvlm", "llava_next")
"""Of these the content is a list of parts, and the project trains on text."""
TEMPLATES = {f"{path.parent.name}/{path.stem}": path for path in [*OURS, *THEIRS] if not path.stem.startswith(NO_TEXT)}
_SPECIAL = re.compile(
    r"<[|｜][^<>\n{}' ]{1,40}?[|｜]>|</?s>|<(?:start|end)_of_turn>|\[/?[A-Z_]{3,20}\]|<turn\|>|<\|turn>"
)


def with_template(tokenizer, name):
    """The tokenizer with a template and the special tokens that stand in it."""
    made, text = copy.deepcopy(tokenizer), TEMPLATES[name].read_text()
    made.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in sorted(set(_SPECIAL.findall(text)))]
    )
    made.bos_token = "<|endoftext|>"
    made.chat_template = text
    return made
