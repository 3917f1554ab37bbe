"""Functions of C files, their kernel-doc comments and where they are called (tree-sitter-c)."""

import functools
import re
from typing import Any, NamedTuple

from sparsex_jax.config import ConfigError

# https://docs.kernel.org/doc-guide/kernel-doc.html: a first line "name() - what it is for".
_DOC_TITLE = re.compile(rb"/\*\*[ \t]*(?:\n[ \t]*\*[ \t]*)?(\w+)[ \t]*(?:\(\))?[ \t]*[-:]")
_TITLE = re.compile(r"(\w+)\s*(?:\(\))?\s*[-:]*\s*")
_MARK = re.compile(r"^\s*\*?\s*")
_QUERY = "(function_definition) @function (call_expression function: (identifier) @call)"


class Function(NamedTuple):
    """A definition; spans count bytes from the file's begin.

    Attributes:
      name: of the function.
      begin: of its first line.
      name_begin, name_end: of the name in the definition.
      body: behind the opening brace.
      end: behind the closing brace.
      doc: begin of the kernel-doc comment, which ends at `begin`; None without one.
    """

    name: bytes
    begin: int
    name_begin: int
    name_end: int
    body: int
    end: int
    doc: int | None


class Call(NamedTuple):
    """A call by name, and the byte that the name begins at."""

    name: bytes
    begin: int


@functools.cache
def _parser() -> tuple[Any, Any]:
    try:
        import tree_sitter
        import tree_sitter_c
    except ImportError as error:
        raise ConfigError(
            "tree-sitter and tree-sitter-c are not installed: use pip install '.[code]'"
        ) from error
    language = tree_sitter.Language(tree_sitter_c.language())
    return tree_sitter.Parser(language), tree_sitter.QueryCursor(
        tree_sitter.Query(language, _QUERY)
    )


def find_functions(text: bytes) -> tuple[list[Function], list[Call]]:
    """The function definitions of a C file and the calls in it, in order.

    Left out is what macros keep tree-sitter from parsing: a definition counts if it begins in the
    first column, its name stands before a parenthesis, and it ends with the first closing brace
    in a first column. So do names in capitals, which are macros.

    Args:
      text: of the file, UTF-8.

    Raises:
      ConfigError: tree-sitter is not installed.
    """
    parser, cursor = _parser()
    found = cursor.captures(parser.parse(text).root_node)
    functions = [x for node in found.get("function", ()) if (x := _function(node, text))]
    calls = [Call(node.text, node.start_byte) for node in found.get("call", ())]
    functions.sort(key=lambda function: function.begin)
    calls.sort(key=lambda call: call.begin)
    return functions, calls


def _function(node: Any, text: bytes) -> Function | None:
    body, declarator = node.child_by_field_name("body"), node
    while declarator is not None and declarator.type != "function_declarator":
        declarator = declarator.child_by_field_name("declarator")
    if declarator is None or body is None or body.type != "compound_statement":
        return None
    name = declarator.child_by_field_name("declarator")
    begin = text.rfind(b"\n", 0, node.start_byte) + 1
    opening = body.start_byte + 1
    if (
        name is None
        or name.type != "identifier"
        or name.text.isupper()
        or text[name.end_byte : name.end_byte + 1] != b"("
        or text[begin : begin + 1].isspace()
        or text.find(b"\n}", opening) + 2 != node.end_byte
    ):
        return None
    return Function(
        name.text, begin, name.start_byte, name.end_byte, opening, node.end_byte,
        _kernel_doc(text, begin, name.text),
    )  # fmt: skip


def _kernel_doc(text: bytes, begin: int, name: bytes) -> int | None:
    """Where the kernel-doc comment of a function begins that ends directly before it."""
    if not text.endswith(b"*/\n", 0, begin):
        return None
    comment = text.rfind(b"/*", 0, begin)
    title = _DOC_TITLE.match(text, comment, begin)
    starts_line = comment == 0 or text[comment - 1 : comment] == b"\n"
    return comment if title and title[1] == name and starts_line else None


def describe(comment: str, name: str) -> str:
    """What a kernel-doc comment says, without the marks of a comment and without the name.

    The title's "name() - " is left out; where the name stands elsewhere, it is FUNCTION. Empty
    lines are dropped.

    Args:
      comment: "/** ... */".
      name: of the function.
    """
    inner = comment.strip().removeprefix("/**").removesuffix("*/")
    lines = [_MARK.sub("", line).rstrip() for line in inner.split("\n")]
    lines = [line for line in lines if line]
    if lines and (title := _TITLE.match(lines[0])) and title[1] == name:
        lines[0] = lines[0][title.end() :]
    text = "\n".join(line for line in lines if line)
    return re.sub(rf"\b{name}\b", "FUNCTION", text) if name in text else text
