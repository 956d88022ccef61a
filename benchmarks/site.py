"""What mkdocs is told beside mkdocs.yml, to build the documentation site from pages that also read well as files.

A hook: a link out of docs/, to a source file, becomes the text it stands on. On disk such links lead to the file, and a
test follows them; the site holds no source files.

An extension of griffe: an annotated field without a docstring is explained by the comment behind it.
"""

import posixpath
import re

import griffe

LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])+)\]\(((?:\.\./)+[^)\s]+)\)")


def without_source_links(text, page):
    """The Markdown of a page, named by its path below docs/, with links that leave docs/ replaced by their text."""

    def replace(match):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), match[2].partition("#")[0]))
        return match[1] if target.startswith("../") else match[0]

    return LINK.sub(replace, text)


def on_page_markdown(markdown, page, config, files):
    return without_source_links(markdown, page.file.src_uri)


class FieldComments(griffe.Extension):
    def on_attribute(self, *, attr, loader, **kwargs):
        if attr.docstring is None and attr.annotation is not None and attr.parent.is_class:
            comment = attr.source.partition("  # ")[2].strip()
            if comment:
                attr.docstring = griffe.Docstring(comment, lineno=attr.lineno, parent=attr)
