# SPDX-License-Identifier: Apache-2.0
"""What recipes on atoms share: structures from files, neighbours, checks, statistics, and parts of potentials."""
