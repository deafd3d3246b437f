"""What stands in a text for something else: a name to be filled in, a picture, a sound."""

import re
from collections import Counter
from collections.abc import Mapping

from .keys import plain
from .rows import DataError

# As LLaMA-Factory, ms-swift and role-play cards write them. Code is left as it is.
_CODE = r"```.*?(?:```|\Z)|`[^`\n]*`"
_PLACEHOLDER = re.compile(_CODE + r"|\{\{\s*([\w -]{1,40}?)\s*\}\}|<(NAME|AUTHOR)>", re.DOTALL | re.IGNORECASE)
_FIELD = {field: field for field in "name author user english_name birth home".split()}
_FIELD |= dict.fromkeys(
    "char bot bot_name model model_name assistant assistant_name ai_name 名字 姓名 名称".split(), "name"
)
_FIELD |= dict.fromkeys("developer company creator owner team organization 作者 开发者 公司 团队".split(), "author")

# Pictures and sound in a text, as Qwen-VL, LLaVA and LLaMA-Factory write them.
_INLINE = re.compile(
    _CODE + r"|(<(?P<one>img|audio|video)>[^<>\s]+</(?P=one)>|<\|(?:image|vision|audio|video)_?\w*\|>"
    r"|^[ \t]*<(?P<two>image|video|audio)>[ \t]*$(?!.*</(?P=two)>)"
    r"|\A\s*<(?P<three>image)>(?!.*</(?P=three)>))",
    re.DOTALL | re.MULTILINE,
)


class Filling:
    """The places to be filled in, with one persona.

    unfilled: how often a place stayed as it was, of those that nobody here knows.
    """

    def __init__(self, persona: object = None) -> None:
        filling = persona if isinstance(persona, Mapping) else vars(persona) if persona else {}
        self.filling = {plain(field): value for field, value in filling.items()}
        self.unfilled: Counter[str] = Counter()

    def fill(self, text: str) -> str:
        """The text with its places filled in. Raises DataError for one that the persona has nothing for."""
        if "{{" in text or "<" in text and ("<NAME>" in text or "<AUTHOR>" in text):
            return _PLACEHOLDER.sub(self._filled, text)
        return text

    def _filled(self, match: re.Match[str]) -> str:
        field = plain(match[1] or match[2] or "")
        if not field:
            return match[0]
        value = self.filling.get(field, self.filling.get(_FIELD.get(field, "")))
        if value is None and field not in _FIELD:
            self.unfilled[match[0]] += 1
            return match[0]
        if value is None:
            raise DataError(
                f"a place to be filled in, {match[0]}. Pass persona=Persona(name=..., author=...) of chatmagic.course, "
                f'or persona={{"{field}": "..."}}.'
            )
        return str(value)


def medium_in(text: str) -> str | None:
    """The first place in a text where a picture or a sound belongs."""
    return next((match[1].strip() for match in _INLINE.finditer(text) if match[1]), None) if "<" in text else None
