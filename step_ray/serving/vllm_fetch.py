"""Brings a model that lies in a store to the node of a vLLM replica, before its engine starts.

Takes addresses from the arguments of a callback of Ray's LLM server, which is not public. It loads
nothing of vLLM.
"""

import asyncio

from ray.llm._internal.common.callbacks.base import CallbackBase

from step_ray.storage.remote import fetch


class FetchModels(CallbackBase):
    """Fetches the `places` of its arguments."""

    async def on_before_node_init(self) -> None:
        """Called by the replica, on its node."""
        for place in self.kwargs["places"]:
            await asyncio.to_thread(fetch, place)
