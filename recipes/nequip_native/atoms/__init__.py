# SPDX-License-Identifier: Apache-2.0
"""What recipes on atoms share: structures from files, neighbour lists, checks and statistics, and parts of potentials."""
