"""Whether all machines train on the same tokens, and on those that were written."""

from __future__ import annotations

import sys
import threading

from fedrun.config import RunConfig
from fedrun.data.tokens import TokenData, verify
from fedrun.distributed.control_plane import Control
from fedrun.distributed.launch import Launch
from fedrun.start import Refused


class CorpusCheck:
    """One rank a machine compares the cached files of the corpus with their checksums, in a thread
    beside sharding and connecting; what is damaged is named and made again."""

    def __init__(self, config: RunConfig, launch: Launch, data: TokenData) -> None:
        self.config, self.data = config, data
        self._problem = ""
        self._thread: threading.Thread | None = None
        if launch.local_rank == 0:
            self._thread = threading.Thread(target=self._check, name="fedrun-corpus", daemon=True)
            self._thread.start()

    def _check(self) -> None:
        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        config = self.config
        try:
            self._problem = "the corpus could not be checked (see above)"  # an error of our own
            verify(config.dataset, config.tokenizer, config.cache_dir, say,
                   config.reading)
            self.data.reopen()
            self._problem = ""
        except (ValueError, OSError) as error:  # ConnectionError and TimeoutError are among them
            self._problem = str(error)

    def agree(self, control: Control) -> TokenData:
        """All ranks: the corpus, mapped from files that were compared; Refused, on all of them,
        where it is damaged on some machine and cannot be made again."""
        if self._thread:
            self._thread.join()
        problems = control.gather(self._problem)
        told = control.share(problems and next(filter(None, problems), ""))
        if told:
            raise Refused(told)
        return self.data.reopen()
