"""The help of a group of commands, under headings."""

from typing import Any

from typer.core import TyperGroup

# As a user's day goes: build, look, use, judge, keep.
GROUPS = {
    "Build": ("demo", "build", "adapt", "merge"),
    "Look": ("cluster", "explore", "explain"),
    "Use": ("generate", "which", "serve", "export"),
    "Judge": ("evaluate", "reproduce"),
    "Keep": ("library",),
}


class GroupedCommands(TyperGroup):
    """The commands under headings in the help."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands of each group; one that is in no group stands at the end."""
        grouped = {name for names in GROUPS.values() for name in names}
        ungrouped = [name for name in self.commands if name not in grouped]
        groups = {heading: [name for name in names if name in self.commands] for heading, names in GROUPS.items()}
        width = max(map(len, self.commands))
        for heading, names in {**groups, "Commands": ungrouped}.items():
            if names:
                with formatter.section(heading):
                    helps = [(name.ljust(width), self.commands[name].get_short_help_str(200)) for name in names]
                    formatter.write_dl(helps)
