"""An episode told in words."""

from __future__ import annotations

from typing import Any


def percent(rates: dict[str, float]) -> str:
    """Rates of classes in one line: ``79 % roll, 21 % s-curve``."""
    return ", ".join(f"{rate:.0%} {name}".replace("%", " %") for name, rate in rates.items())


def plural(n: int, noun: str) -> str:
    """``1 answer``, ``2 answers``."""
    return f"{n} {noun}{'s' * (n != 1)}"


def closing(summary: dict[str, Any]) -> str:
    """The summary of ``Episode.finish`` for a person: what was answered, and the rates before and after."""
    count = {k: summary[k] for k in ("choices", "none_will_do", "skips", "undone")}
    lines = [
        "",
        f"{plural(summary['answers'], 'answer')} ({plural(count['choices'], 'choice')}, "
        f"{count['none_will_do']} none will do, {count['skips']} skipped; {count['undone']} taken back) "
        f"in {summary['seconds_answering']:.0f} s; {summary['agent']} learned for "
        f"{summary['seconds_learning']:.0f} s.",
    ]
    before, after = summary["rates_before"], summary["rates_after"]
    if before:
        width = max(map(len, before))
        lines.append(f"{'':{width}}  model A  model B")
        lines += [f"{k:{width}}  {before[k]:7.0%}  {after[k]:7.0%}" for k in before]
    left = summary["answers"] - summary["learned"]
    if left:
        lines.append(
            f"{plural(left, 'answer')} not learned from yet: that is done when you come back."
        )
    lines.append(f"A beside B: {summary['folder']}/shapes.png. The same command goes on from here.")
    return "\n".join(lines)
