"""Mean teacher, CCT and GCT in the form in which the authors of CPS ship them beside it."""
