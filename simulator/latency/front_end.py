"""What a request meets before and behind the engine's steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class FrontEnd:
    """What a first token takes beside the steps that read its prompt.

    Args:
        request_s: seconds of the server and the client a request.
        token_s: seconds of the tokeniser a token of the prompt.
        steps: decode steps for which a new request waits, since steps are planned ahead.
        peer_s: seconds for each request that is served at once, whose tokens the same server sends.
        within: half of the 80 % interval of a first token, as a factor.
    """

    request_s: float = 0.0
    token_s: float = 0.0
    steps: float = 0.0
    peer_s: float = 0.0
    within: float = 1.0

    def seconds(
        self, prompt_tokens: npt.ArrayLike, step_s: npt.ArrayLike, at_once: npt.ArrayLike
    ) -> npt.NDArray[np.float64]:
        """Seconds of a first token beside its prompt's steps.

        Args:
            prompt_tokens: of the prompt.
            step_s: of a decode step.
            at_once: requests that are served at once.
        """
        tokens, step = np.asarray(prompt_tokens, np.float64), np.asarray(step_s, np.float64)
        of_peers = self.peer_s * np.asarray(at_once, np.float64)
        return np.asarray(self.request_s + self.token_s * tokens + self.steps * step + of_peers)


NOTHING = FrontEnd()
