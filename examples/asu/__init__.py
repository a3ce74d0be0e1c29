"""SET and NPSET on the ASU data sets (Liu, Mocanu, Pechenizkiy 2019)."""
