"""The layout of an image's visual tokens: register tokens, then a grid of rows x columns or a set of tokens.

Only this module derives a grid from a number of tokens. Configs and codes.json store the layout as a dict; in
files without one (all older files) the grid is square: num_tokens - registers = side ** 2.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError


class TokenLayout(NamedTuple):
    """A grid of `rows` x `columns` tokens in raster order; `registers` tokens precede it.

    With `tokens`, the encoder computes that many tokens from the grid of the image, a set or 1-D sequence
    without places in it (SweetTok's queries, GaussianToken's Gaussians), and these are the visual tokens.
    """

    rows: int
    columns: int
    registers: int = 0
    tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """N: tokens per image, registers included."""
        return (self.tokens or self.rows * self.columns) + self.registers

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows, self.columns

    @classmethod
    def square(cls, num_tokens: int, registers: int = 0) -> "TokenLayout":
        """The square grid of `num_tokens` minus `registers`.

        Raises:
            UserError: the difference is not a square number.
        """
        side = math.isqrt(max(num_tokens - registers, 0))
        if side == 0 or side * side != num_tokens - registers:
            raise UserError(
                f"{num_tokens} visual tokens minus {registers} registers do not fill a square grid: "
                "give token_layout = {rows, columns, registers}."
            )
        return cls(side, side, registers)

    @classmethod
    def from_config(
        cls, value: "Mapping[str, Any] | TokenLayout | None", num_tokens: int | None, registers: int = 0
    ) -> "TokenLayout":
        """The layout stored in a config as `token_layout`; None is the square one.

        `num_tokens` is the expected number of tokens; None accepts the layout's own.

        Raises:
            UserError: a key or value is not valid, or the layout does not have `num_tokens` tokens.
        """
        if value is None:
            return cls.square(num_tokens or 0, registers)
        given = value._asdict() if isinstance(value, TokenLayout) else dict(value)
        known = {"registers": registers, "tokens": 0} | given
        # bool is a subclass of int in Python: True must not count as 1 row
        whole = {name: v for name, v in known.items() if isinstance(v, int) and not isinstance(v, bool)}
        if whole.keys() != set(cls._fields) or len(known) != len(whole):
            raise UserError(
                f"token_layout is {given!r}; expected the integers rows, columns and, optionally, registers "
                "and tokens."
            )
        layout = cls(**whole)
        if layout.rows < 1 or layout.columns < 1 or layout.registers < 0 or layout.tokens < 0:
            raise UserError(
                f"token_layout is {given!r}: rows and columns must be at least 1, registers and tokens at "
                "least 0."
            )
        if num_tokens is not None and layout.num_tokens != num_tokens:
            raise UserError(f"token_layout {given!r} has {layout.num_tokens} tokens, expected {num_tokens}.")
        return layout

    def to_dict(self) -> dict[str, int]:
        """The form stored in configs and codes.json; without `tokens` where every cell has its token."""
        stored = self._asdict()
        return stored if self.tokens else {name: stored[name] for name in stored if name != "tokens"}

    def complete_rows(self, num_generated: int) -> int:
        """Rows of the grid that the first `num_generated` tokens complete; a preview may show these."""
        if self.tokens:  # each may show anywhere: no part of the image is complete before all of them
            return self.rows if num_generated >= self.num_tokens else 0
        # registers are generated first and complete no row
        return min(max(num_generated - self.registers, 0) // self.columns, self.rows)

    def tokens_of_rows(self, rows: int) -> int:
        """Number of tokens up to the end of the first `rows` rows, registers included."""
        if self.tokens and rows:
            return self.num_tokens
        return self.registers + rows * self.columns

    @property
    def row_ends(self) -> list[int]:
        """The numbers of tokens after which more rows are complete, in order."""
        return sorted({self.tokens_of_rows(row) for row in range(1, self.rows + 1)})

    def __str__(self) -> str:
        """As in "holds images of 16 x 16 visual tokens"."""
        if self.tokens:
            return f"{self.tokens} visual tokens of {self.rows} x {self.columns} patches"
        return f"{self.rows} x {self.columns} visual tokens"


def grid_of_codes(count: int, grid: tuple[int, int] | None, registers: int) -> tuple[int, int]:
    """(rows, columns) of `count` codes, registers included: `grid`, or the square one.

    Raises:
        UserError: they do not fill it.
    """
    if grid is None:
        try:
            return TokenLayout.square(count, registers).grid
        except UserError as error:
            raise UserError(f"{error} Or pass grid=(rows, columns).") from None
    layout = TokenLayout(int(grid[0]), int(grid[1]), registers)
    if min(layout.grid) < 1 or layout.num_tokens != count:
        raise UserError(
            f"grid = {layout.grid} does not fit {count - registers} image tokens, {registers} registers."
        )
    return layout.grid


def only_grid(own: tuple[int, int], grid: tuple[int, int] | None, what: str) -> tuple[int, int]:
    """The grid `own` of codes that have no other.

    Raises:
        UserError: `grid` is another one.
    """
    if grid is not None and (int(grid[0]), int(grid[1])) != own:
        raise UserError(f"grid = {tuple(grid)} does not fit {what}: expected {own}.")
    return own
