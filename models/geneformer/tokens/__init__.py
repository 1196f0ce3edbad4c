# SPDX-License-Identifier: Apache-2.0
"""What recipes of token sequences share: layers, batch layouts, number formats; imports `common` besides."""
