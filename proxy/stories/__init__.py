"""In which order the legs of a request run; one file an order. A contract names its order, `STORIES` has the story.

A story returns the decoder's answer (whole, or a stream at its first telling event) or raises ProxyError or PassOn.
Until it returns, the client has seen nothing, so that everything in it can be tried again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from proxy.answer import Answer
from proxy.contracts import Order
from proxy.flow import Flow
from proxy.legs import Legs
from proxy.stories.prefill_first import prefill_first

Story = Callable[[Flow, Legs], Awaitable[Answer]]

STORIES: dict[Order, Story] = {Order.PREFILL_FIRST: prefill_first}
