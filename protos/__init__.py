"""The wire: what services and clients have in common.

Every package of ours that uses grpc imports this one first: grpc reads GRPC_VERBOSITY when it is imported, and would otherwise
write lines of its own to stderr for every connection that ends or is refused.
"""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
