"""Reads text as YAML 1.2 with PyYAML's scanner: the one meaning of a value in a file, at `--set` and in a test.

Why not PyYAML's safe loader: it reads YAML 1.1, in which `0100` is 64, `10:30` is 630, `1e-4` is text and `no` is
false. Here numbers, true, false and null are those of YAML 1.2's core schema (https://yaml.org/spec/1.2.2/, 10.3), and
a plain word that is another type in YAML 1.1 and changes its meaning (`yes`, `1_000`) is refused instead of guessed.
Merge keys (`<<`), which 1.2 dropped and configurations use, are kept. Why not ruamel.yaml: it recurses as deep as the
text says, and has no limit on what aliases and merges expand to.

Usage:
    parse_yaml("lr: 1e-4")     # {"lr": 0.0001}
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

import yaml

MAX_DEPTH = 20
_TAG = "tag:yaml.org,2002:"
_PLAIN = "a plain scalar"  # no tag that a file can write
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# Plain words that YAML 1.1 takes for true or false, and numbers that it takes with underscores or in base 2.
_OLD_BOOL = re.compile(r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF")
_OLD_NUMBER = re.compile(r"[-+]?(0b[01_]+|(?=[0-9_.]*_)\.?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?)")
# PyYAML's words for what is wrong, and ours; {0} is what the pattern caught, {line} where the bracket or quote opens.
_PLAINLY = (
    (r"found character '\\t' that cannot start", "a tab stands here: use spaces"),
    (r"found character '(.)' that cannot start", "no value begins with {0}: put the text in quotes"),
    (r"expected ',' or '(.)'", "a {0} is missing: the bracket that opens in line {line} is not closed"),
    (r"expected the node content, but found '<stream end>'", "the text ends here, and a bracket is not closed"),
    (r"found unexpected end of stream", "the text ends here, and the quote of line {line} is not closed"),
    (r"expected '<document start>', but found '(.)'", "there is a {0} too many"),
    (
        r"expected <block end>",
        "the indentation is not that of the lines above: keys of one section begin in one column",
    ),
    (
        r"mapping values are not allowed",
        "no colon can stand here: put a text with a colon in quotes, or mend the spaces",
    ),
    (r"could not find expected ':'", "a colon is missing since line {line}: a line is `key: value`"),
    (
        r"sequence entries are not allowed",
        "a dash can begin a line only: write the list as [a, b], or in lines of its own",
    ),
    (r"but found another document", "a configuration is a single document: `---` begins another one"),
)
_OLD_BREAK = re.compile("[\x85\u2028\u2029]")  # ends a line in YAML 1.1 alone
_WIDEST = 1 << 63  # a whole number beyond 64 bits is no setting, and fails far from its file


class YamlError(ValueError):
    """Text that is not YAML, or that is no configuration value; its text is one line."""


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars by YAML 1.2's core schema, bounds nesting, and refuses repeated keys."""

    yaml_constructors: ClassVar[dict[str | None, Callable[..., Any]]] = {}

    def fetch_flow_collection_start(self, TokenClass: Any) -> Any:
        if self.flow_level >= MAX_DEPTH:  # PyYAML needs quadratic time for open brackets, so stop at once
            raise yaml.scanner.ScannerError(None, None, "nested too deeply", self.get_mark())
        return super().fetch_flow_collection_start(TokenClass)

    def add_indent(self, column: int) -> bool:
        if len(self.indents) > 2 * MAX_DEPTH:
            raise yaml.scanner.ScannerError(None, None, "nested too deeply", self.get_mark())
        return bool(super().add_indent(column))

    def _fail(self, node: yaml.Node, text: str) -> yaml.constructor.ConstructorError:
        return yaml.constructor.ConstructorError(None, None, text, node.start_mark)

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        """Name what an untagged node is: a plain scalar, a quoted one, a list or a mapping."""
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit[0] else _TAG + "str"
        return _TAG + ("seq" if kind is yaml.SequenceNode else "map")

    def plain(self, node: yaml.Node) -> Any:
        """Convert an unquoted scalar by the core schema."""
        text = str(node.value)
        if _NULL.fullmatch(text):
            return None
        if _BOOL.fullmatch(text):
            return text.lower() == "true"
        if _INT.fullmatch(text):
            base = {"0o": 8, "0x": 16}.get(text[:2], 10)
            value = int(text, base) if len(text) < 40 else _WIDEST
            if not -_WIDEST <= value < _WIDEST:
                raise self._fail(node, "a whole number beyond 64 bits")
            return value
        if _FLOAT.fullmatch(text):
            return float(text)
        if _NOT_FINITE.fullmatch(text):
            return float(text.replace(".", ""))
        if _OLD_BOOL.fullmatch(text):
            meant = "true" if text.lower() in ("yes", "on") else "false"
            raise self._fail(node, f"{text} is {meant} to some readers and text to others: write {meant} or '{text}'")
        if _OLD_NUMBER.fullmatch(text):
            plain = text.replace("_", "")
            plain = str(int(plain, 2)) if "b" in plain[:3].lower() and len(plain) < 80 else plain
            raise self._fail(node, f"{text[:40]} is a number to some readers and text to others: write {plain[:40]}")
        return text

    def sequence(self, node: yaml.Node) -> list[Any]:
        """Convert a list with all that is in it."""
        if not isinstance(node, yaml.SequenceNode):
            raise self._fail(node, "a list is wanted here")
        return [self.construct_object(item, deep=True) for item in node.value]

    def mapping(self, node: yaml.Node) -> dict[Any, Any]:
        """Convert a mapping; its own keys win over merged ones, and earlier merged mappings over later ones."""
        if not isinstance(node, yaml.MappingNode):
            raise self._fail(node, "a mapping is wanted here")
        own: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value == "<<" and key_node.style is None:
                found = self.construct_object(value_node, deep=True)
                for part in found if isinstance(found, list) else [found]:
                    if not isinstance(part, dict):
                        raise self._fail(value_node, "`<<` wants a mapping or a list of mappings")
                    merged = {**part, **merged}
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise self._fail(key_node, "a key must be a word or a number")
            if key in own:
                raise self._fail(key_node, f"the key {key!r} appears twice")
            own[key] = self.construct_object(value_node, deep=True)
        return {**merged, **own}

    def text(self, node: yaml.Node) -> str:
        """Convert a quoted scalar, or any that `!!str` makes a text."""
        if not isinstance(node, yaml.ScalarNode):
            raise self._fail(node, "a text is wanted here")
        try:  # JSON, which is YAML, writes a character beyond 16 bits as two escapes: "\\ud83d\\ude00"
            return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise self._fail(node, "a text holds half of a character") from None

    def refuse(self, node: yaml.Node) -> Any:
        """Refuse any other tag: dates, bytes, sets, Python objects."""
        raise self._fail(node, f"the tag {node.tag.removeprefix(_TAG)!r:.60} is not used in configurations")


_Loader.add_constructor(_PLAIN, _Loader.plain)
_Loader.add_constructor(_TAG + "str", _Loader.text)
_Loader.add_constructor(_TAG + "seq", _Loader.sequence)
_Loader.add_constructor(_TAG + "map", _Loader.mapping)
_Loader.add_constructor(None, _Loader.refuse)


def parse_yaml(text: str) -> Any:
    """Return the value of one YAML document: None, bool, int, float, str, list or dict.

    Raises:
        YamlError: not YAML, a repeated key, a value that YAML 1.1 and 1.2 read differently, a tag of no plain value, or
            nesting beyond `MAX_DEPTH`.
    """
    broken = _OLD_BREAK.search(text)
    if broken is not None:
        line, code = text.count("\n", 0, broken.start()) + 1, ord(broken[0])
        ends = "ends a line for some readers and not for others"
        raise YamlError(f"line {line}: U+{code:04X} {ends}: write it in double quotes, as \\u{code:04x}")
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise YamlError("nested too deeply") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"line {line}: the control character U+{error.character:04X} is no text") from error
    except yaml.MarkedYAMLError as error:
        raise YamlError(_said_plainly(error)) from error
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError, LookupError) as error:
        # PyYAML lets a few plain exceptions through, for example for a percent sign in a tag.
        raise YamlError(" ".join(str(error).split())) from error


def is_flag_or_number(text: str) -> bool:
    """Returns whether a text is a flag or a number to some reader if it stands without quotes."""
    return any(pattern.fullmatch(text) for pattern in (_BOOL, _INT, _FLOAT, _OLD_BOOL, _OLD_NUMBER))


def _said_plainly(error: yaml.MarkedYAMLError) -> str:
    """Returns the line and one sentence of an error of which PyYAML tells two halves and two places."""
    problem = error.problem or error.context or "it cannot be read"
    place = error.problem_mark or error.context_mark
    opened = error.context_mark or place
    for pattern, words in _PLAINLY:
        found = re.search(pattern, problem)
        if found is not None:
            problem = words.format(*found.groups(), line=0 if opened is None else opened.line + 1)
            break
    return problem if place is None else f"line {place.line + 1}: {' '.join(problem.split())}"
