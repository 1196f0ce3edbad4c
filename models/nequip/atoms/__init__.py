# SPDX-License-Identifier: Apache-2.0
"""What recipes on atoms share: structures and neighbours, and the parts of equivariant potentials."""
