"""The HTTP side of the served agent: OpenAI's routes, the agent's own, and who may use them.

It knows requests, answers and errors; it knows nothing of models, batches or Ray.
"""
