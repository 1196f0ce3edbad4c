# SPDX-License-Identifier: Apache-2.0
"""Cells as users have them, counts of genes in h5ad and SCDL, and as models read them, genes by falling rank."""
