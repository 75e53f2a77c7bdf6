"""The explorer's keys, with the words of its footer, its help and its palette."""

from __future__ import annotations

from textual.binding import Binding

KEYS = (
    Binding("question_mark", "help", "Help", key_display="?", tooltip="This page"),
    Binding("x", "axis('x')", "Axes", tooltip="Another figure across"),
    Binding("y", "axis('y')", "Upward", tooltip="Another figure upward", show=False),
    Binding("k", "colour", "Colour", tooltip="Plans by method, bits, split or context"),
    Binding("p", "plans", "Plans", tooltip="The table of plans, or the plot"),
    Binding(
        "slash",
        "search",
        "Search",
        key_display="/",
        show=False,
        tooltip="Plans whose trial, method, bits or split hold these words",
    ),
    Binding("h", "shade", "Heads", tooltip="Heads by budget, bits or method"),
    Binding("w", "what_if", "What if", tooltip="Other contexts, batches, cards and limits"),
    Binding("f", "filter", "Filter", tooltip="Which plans are shown"),
    Binding("m", "mark", "Mark", tooltip="Mark the plan, to compare others with"),
    Binding("c", "compare", "Compare", tooltip="With the marked plan or a baseline"),
    Binding("e", "export", "Export", tooltip="To a policy file or a serving stack"),
    Binding("v", "validate", "Validate", tooltip="Run the model with this plan"),
    Binding(
        "escape",
        "leave_what_if",
        "As searched",
        show=False,
        tooltip="Leave what if: everything as it was searched",
    ),
    Binding("g", "go_chosen", "Chosen", tooltip="Back to the chosen plan", show=False),
)
