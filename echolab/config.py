"""Options that are checked: typed, frozen, unknown ones refused."""

from __future__ import annotations

import difflib
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from echolab.errors import WrongUsage


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def make(cls, **options: Any) -> Self:
        """As the constructor, with one line instead of pydantic's page where it fails."""
        try:
            return cls(**options)
        except ValidationError as e:
            problem = e.errors()[0]
            where = ".".join(str(p) for p in problem["loc"] if p != "[key]")
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                near = difflib.get_close_matches(where, cls.model_fields, 1)
                message = f"no such option{'; did you mean ' + near[0] + '?' if near else ''}"
            raise WrongUsage(f"{where}: {message}" if where else message) from None
