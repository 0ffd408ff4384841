"""The space of ``wph_dequant``: compressed pages to bf16 rows."""
